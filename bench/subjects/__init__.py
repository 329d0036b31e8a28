"""What is measured on this machine, a module for each: linear layers, grouped products, experts, routing, models."""

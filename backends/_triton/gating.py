"""What lies between the gate and up projections and the down projection of an expert."""

import triton
import triton.language as tl


@triton.jit
def _over_one_plus_exp(g, minus_x):
    """g / (1 + e^-x)."""
    return tl.div_rn(g, 1.0 + tl.exp(minus_x))


@triton.jit
def _erfc(z):
    """Of z >= 0: t e^(-z^2 + P(t)), t = 1 / (1 + z / 2), within 1.2e-7 of it: the Chebyshev fit of Press et al.,
    Numerical Recipes, section 6.2."""
    t = tl.div_rn(1.0, 1.0 + 0.5 * z)
    p = 0.17087277 * t - 0.82215223
    p = p * t + 1.48851587
    p = p * t - 1.13520398
    p = p * t + 0.27886807
    p = p * t - 0.18628806
    p = p * t + 0.09678418
    p = p * t + 0.37409196
    p = p * t + 1.00002368
    p = p * t - 1.26551223
    return t * tl.exp(p - z * z)


@triton.jit
def gated(g, u, alpha, beta, limit, ACTIVATION: tl.constexpr, HAS_LIMIT: tl.constexpr):
    """h of fused_experts' equation. Comparisons, since a minimum would drop NaN."""
    if HAS_LIMIT:
        g = tl.where(g > limit, limit, g)
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
    if ACTIVATION == "swiglu":
        h = _over_one_plus_exp(g, -alpha * g)
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh z) / 2 = 1 / (1 + e^-2z), z = sqrt(2 / pi) (g + 0.044715 g^3)
        h = _over_one_plus_exp(g, (-1.595769122 * g) * (0.044715 * g * g + 1.0))
    else:  # g Phi(g) = max(g, 0) - |g| erfc(|g| / sqrt 2) / 2, and from 14 on erfc is 0 in float32
        size = tl.abs(g)
        size = tl.where(size > 14.0, 14.0, size)
        h = tl.where(g < 0.0, 0.0, g) - 0.5 * size * _erfc(0.707106781 * size)
    return h * (u + beta)

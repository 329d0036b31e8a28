// Lanes that have to meet.
#pragma once
#include "warp.h"

namespace moekern::emulator {

// Whether all lanes of a member mask that still run are here. If not, the instruction has to be tried again.
bool met(Warp& w, uint32_t lanes, uint32_t members);
Status meet_warp(Warp& w, const Instruction& i, uint32_t lanes);  // bar.warp.sync

// A warp of the CTA has exited: barriers that count all of them may be complete now.
void barriers_without(Warp& w);
void cluster_complete(Cluster& cluster, Launch& launch);

}  // namespace moekern::emulator

// How kernels keep to turns.h.
#pragma once

#include "engine/kernels/cuda/turns.h"

namespace tandem::engine::cuda {

__device__ inline volatile uint32_t* TurnHere(uint32_t* turns) {
  uint32_t multiprocessor;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(multiprocessor));
  return turns + multiprocessor % kTurns;
}

// What TakeTurn sees at first, for who has something else to wait for meanwhile.
__device__ inline uint32_t LookAtTurn(uint32_t* turns) {
  return threadIdx.x == 0 ? *TurnHere(turns) : 0;
}

// All threads. Whom this waits for runs already, and waits for nobody who comes later.
__device__ inline void TakeTurn(uint32_t* turns, uint32_t seen = 1) {
  if (threadIdx.x == 0) {
    volatile uint32_t* turn = TurnHere(turns);
    while (seen != 0 && (seen = *turn) != 0) __nanosleep(20);
    *turn = 1;
  }
  __syncthreads();
}

// One thread, once this thread block has called for everything.
__device__ inline void EndTurn(uint32_t* turns) { *TurnHere(turns) = 0; }

}  // namespace tandem::engine::cuda

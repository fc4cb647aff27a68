// What `tandem doctor` finds on this machine: a plain value.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tandem::cli {

struct GpuFacts {
  std::string name;
  uint64_t memory_bytes = 0;
  std::string bus;             // "0000:c1:00.0"
  int node = -1;               // NUMA node of the host that it is nearest to; -1: not known
  bool exports_memory = true;  // by descriptors, as cuda_ipc needs it
  std::vector<bool> reaches;   // by GPU: peer access; itself too
};

struct HostFacts {
  std::string cpu;
  int cores = 0;  // that this process may use
  uint64_t memory_bytes = 0;
  uint64_t memory_available = 0;
  int numa_nodes = 0;
  uint64_t shm_bytes = 0;  // of /dev/shm; 0: there is none
  uint64_t shm_free = 0;
  uint64_t locked_bytes = 0;  // that a process may lock; UINT64_MAX: as much as it wants
  uint64_t open_files = 0;    // descriptors of a process; UINT64_MAX: no limit
  // Why a process cannot be watched through a descriptor (pidfd_open), or its name in the abstract
  // namespace of Unix sockets not be taken: then nothing is shared with it. Empty: both work.
  std::string sharing_error;
  bool cuda_built = false;  // this build computes on GPUs
  std::string driver;       // "13.0"; empty: none, and `driver_error` says why
  std::string driver_error;
  std::vector<GpuFacts> gpus;
};

HostFacts ReadHostFacts();

}  // namespace tandem::cli

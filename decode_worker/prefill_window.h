// How much is asked of prefill workers at once.
//
// What waits in a prefill worker's queue holds a slot and blocks here, and gains nothing by it: the
// worker needs no more than what it computes and what comes next. So each is asked for a window of
// tokens, and the rest waits in the PrefillBacklog and holds nothing. Short prompts have a window
// of their own, for a prefill worker takes them in beside long ones.
//
// Not thread-safe: part of the loop.
#pragma once

#include <cstdint>
#include <string>

#include "absl/container/flat_hash_map.h"

namespace tandem::decode {

struct PrefillWindowOptions {
  int tokens = 4096;  // of one prefill worker
  // Of all of them together, so that something is left for what is computed here.
  int prompts = 1 << 30;
  int blocks = 1 << 30;
};

class PrefillWindow {
 public:
  explicit PrefillWindow(PrefillWindowOptions options) : options_(options) {}

  // Whether one more prompt may be asked for, of which the worker computes `tokens` and which takes
  // `blocks` here. Always, of a worker that computes nothing, if no other does either; and one long
  // prompt may wait behind another, so that the worker never stands idle.
  bool HasRoom(const std::string& worker, int tokens, int blocks) const;
  // It was asked for; it was answered, or given up.
  void Add(const std::string& worker, int tokens, int blocks);
  void Remove(const std::string& worker, int tokens, int blocks);

 private:
  struct Lane {
    int prompts = 0;
    int64_t tokens = 0;
  };
  struct Worker {
    Lane short_prompts, long_prompts;
  };
  bool IsShort(int tokens) const { return tokens <= options_.tokens / 8; }

  const PrefillWindowOptions options_;
  absl::flat_hash_map<std::string, Worker> workers_;  // that something was asked of
  int prompts_ = 0;
  int64_t blocks_ = 0;
};

}  // namespace tandem::decode

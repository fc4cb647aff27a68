// The seam between speculation and where its guesses come from.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

namespace tandem::decode {

// Tokens that may come next.
struct Draft {
  std::vector<int32_t> tokens;
  int evidence = 0;  // how much speaks for them: more is better
};

// Of one sequence. Not thread-safe.
class Drafter {
 public:
  virtual ~Drafter() = default;

  // What may follow `tokens`, the whole sequence so far, which only grows from call to call: at
  // most `most` tokens. May be asked for none, to keep up.
  virtual Draft Propose(std::span<const int32_t> tokens, int most) = 0;
};

using DrafterFactory = std::function<std::unique_ptr<Drafter>()>;

}  // namespace tandem::decode

#include "cli/bench/workload.h"

#include <algorithm>
#include <cmath>
#include <random>

namespace tandem::cli {
namespace {

// Names of pieces. A trace's hash ids are small numbers of their own.
constexpr uint64_t kUnshared = uint64_t{1} << 62;
constexpr uint64_t kPrefix = uint64_t{2} << 62;

class LengthDrawer {
 public:
  explicit LengthDrawer(const Lengths& lengths)
      : ratio_(lengths.range_ratio), random_(lengths.seed) {}

  int Draw(int length) {
    const double share = std::uniform_real_distribution<double>(1 - ratio_, 1 + ratio_)(random_);
    return std::max(1, static_cast<int>(std::lround(share * length)));
  }

 private:
  const double ratio_;
  std::mt19937_64 random_;
};

int Scaled(int64_t length, double scale) {
  return static_cast<int>(std::max<int64_t>(1, std::llround(static_cast<double>(length) * scale)));
}

// splitmix64's finish: every bit of the result depends on every bit of `x`.
uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

}  // namespace

int64_t Conversation::Length() const {
  int64_t length = 0;
  for (const Turn& turn : turns) {
    for (const Piece& piece : turn.pieces) length += piece.tokens;
    length += turn.output_tokens;
  }
  return length;
}

std::vector<Conversation> RandomWorkload(int count, const Lengths& lengths, int prefix,
                                         int num_prefixes) {
  LengthDrawer drawer(lengths);
  std::vector<Conversation> out;
  for (int i = 0; i < count; ++i) {
    Turn turn;
    if (prefix > 0) {
      turn.pieces.push_back({kPrefix + static_cast<uint64_t>(i % num_prefixes), prefix});
    }
    turn.pieces.push_back({kUnshared + static_cast<uint64_t>(i), drawer.Draw(lengths.input)});
    turn.output_tokens = drawer.Draw(lengths.output);
    out.push_back({0, {std::move(turn)}});
  }
  return out;
}

std::vector<Conversation> TwoTurnWorkload(int count, int first, int second,
                                          const Lengths& lengths) {
  LengthDrawer drawer(lengths);
  std::vector<Conversation> out;
  for (int i = 0; i < count; ++i) {
    Conversation conversation;
    for (const int length : {first, second}) {
      const uint64_t name = kUnshared + 2 * static_cast<uint64_t>(i) + conversation.turns.size();
      Turn turn;
      turn.pieces.push_back({name, drawer.Draw(length)});
      turn.output_tokens = drawer.Draw(lengths.output);
      conversation.turns.push_back(std::move(turn));
    }
    out.push_back(std::move(conversation));
  }
  return out;
}

std::vector<Conversation> TraceWorkload(const std::vector<TraceEntry>& trace,
                                        const TraceReplay& replay) {
  const int block = Scaled(replay.block_tokens, replay.length_scale);
  std::vector<Conversation> out;
  for (const TraceEntry& entry : trace) {
    Turn turn;
    int left = Scaled(entry.input_length, replay.length_scale);
    for (const uint64_t id : entry.hash_ids) {
      if (left == 0) break;
      turn.pieces.push_back({id, std::min(left, block)});
      left -= turn.pieces.back().tokens;
    }
    if (left > 0) turn.pieces.push_back({kUnshared + out.size(), left});
    turn.output_tokens = Scaled(entry.output_length, replay.length_scale);
    out.push_back({entry.timestamp_ms / 1e3 / replay.speed, {std::move(turn)}});
  }
  return out;
}

void AppendTokens(const Piece& piece, uint64_t seed, uint32_t vocab_size,
                  std::vector<uint32_t>* out) {
  const uint64_t start = Mix(Mix(seed + 1) ^ piece.name);
  for (int i = 0; i < piece.tokens; ++i) {
    const uint64_t drawn = Mix(start + static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15ULL);
    out->push_back(static_cast<uint32_t>(drawn % vocab_size));
  }
}

}  // namespace tandem::cli

#include "kvtransfer/store/staging_plan.h"

#include <algorithm>
#include <random>

#include "gtest/gtest.h"

namespace tandem::kvtransfer {
namespace {

TEST(StagingPlan, NothingIsOneEmptyBatch) {
  StagingPlan plan({}, CopyDirection::kFromPool, {64, 4, 1024});
  EXPECT_TRUE(plan.Next().empty());
  EXPECT_TRUE(plan.Next().empty());
}

TEST(StagingPlan, DirectionSaysWhichSideIsThePool) {
  const CopyPiece copy = {160, 32, 48};
  StagingPlan out({&copy, 1}, CopyDirection::kFromPool, {64, 4, 1024});
  EXPECT_EQ(out.Next(), (std::vector<StagedPiece>{{160, 32, 0, 48}}));
  StagingPlan in({&copy, 1}, CopyDirection::kIntoPool, {64, 4, 1024});
  EXPECT_EQ(in.Next(), (std::vector<StagedPiece>{{32, 160, 0, 48}}));
}

TEST(StagingPlan, CutsPiecesAndBatches) {
  const std::vector<CopyPiece> copies = {{1000, 0, 150}, {0, 500, 0}, {3000, 600, 20}};
  StagingPlan plan(copies, CopyDirection::kFromPool, {64, 100, 160});
  // 1000 is 8 beyond a multiple of 16, and so is its place in the buffer.
  EXPECT_EQ(plan.Next(), (std::vector<StagedPiece>{{1000, 0, 8, 64}, {1064, 64, 88, 64}}));
  EXPECT_EQ(plan.Next(), (std::vector<StagedPiece>{{1128, 128, 8, 22}, {3000, 600, 40, 20}}));
  EXPECT_TRUE(plan.Next().empty());
}

TEST(StagingPlan, BatchesAreTheCopiesWithinTheLimits) {
  std::mt19937_64 random(3);
  for (int round = 0; round < 300; ++round) {
    std::vector<CopyPiece> copies;
    uint64_t host = random() % 40;
    for (uint64_t n = random() % 20; n > 0; --n) {
      copies.push_back({random() % 4096, host, random() % 300});
      host += copies.back().bytes + random() % 50;
    }
    const StagingLimits limits = {16 * (1 + random() % 8), 1 + random() % 10,
                                  16 * (9 + random() % 32)};
    StagingPlan plan(copies, CopyDirection::kFromPool, limits);
    std::vector<CopyPiece> seen;
    while (true) {
      const std::vector<StagedPiece>& batch = plan.Next();
      if (batch.empty()) break;
      ASSERT_LE(batch.size(), limits.max_pieces);
      uint64_t end = 0;
      for (const StagedPiece& piece : batch) {
        ASSERT_GT(piece.bytes, 0);
        ASSERT_LE(piece.bytes, limits.piece_bytes);
        ASSERT_GE(piece.buffer_offset, end);
        ASSERT_EQ(piece.buffer_offset % kStagingAlignment, piece.pool_offset % kStagingAlignment);
        end = piece.buffer_offset + piece.bytes;
        ASSERT_LE(end, limits.buffer_bytes);
        // Joined again: what was cut goes on where it ended.
        if (!seen.empty() && seen.back().source_offset + seen.back().bytes == piece.pool_offset &&
            seen.back().target_offset + seen.back().bytes == piece.host_offset) {
          seen.back().bytes += piece.bytes;
        } else {
          seen.push_back({piece.pool_offset, piece.host_offset, piece.bytes});
        }
      }
    }
    std::vector<CopyPiece> wanted;
    for (const CopyPiece& copy : copies) {
      if (copy.bytes == 0) continue;
      if (!wanted.empty() &&
          wanted.back().source_offset + wanted.back().bytes == copy.source_offset &&
          wanted.back().target_offset + wanted.back().bytes == copy.target_offset) {
        wanted.back().bytes += copy.bytes;
      } else {
        wanted.push_back(copy);
      }
    }
    ASSERT_EQ(seen, wanted);
  }
}

}  // namespace
}  // namespace tandem::kvtransfer

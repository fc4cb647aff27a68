#include "router/request/request.h"

#include <optional>
#include <utility>

#include "gtest/gtest.h"

#include "router/request/open_streams.h"

namespace tandem::router {
namespace {

TEST(LogName, NamesTheSessionAndShowsNoControlCharacters) {
  Request request;
  request.id = "r1";
  EXPECT_EQ(LogName(request), "r1");
  request.session_id = "a\nfake line";
  EXPECT_EQ(LogName(request), "r1 (session a\\nfake line)");
}

TEST(OpenStreams, AStreamIsOpenUntilItsSlotGoes) {
  OpenStreams streams;
  EXPECT_TRUE(streams.AwaitNone(absl::ZeroDuration()));
  std::optional<OpenStreams::Slot> slot = streams.Open();
  OpenStreams::Slot moved = *std::move(slot);
  slot.reset();  // it has nothing to give back any more
  EXPECT_EQ(streams.open(), 1);
  EXPECT_FALSE(streams.AwaitNone(absl::ZeroDuration()));
  { const OpenStreams::Slot last = std::move(moved); }
  EXPECT_EQ(streams.open(), 0);
}

TEST(OpenStreams, StopAcceptingLeavesOpenStreamsAlone) {
  OpenStreams streams;
  const OpenStreams::Slot slot = streams.Open();
  EXPECT_TRUE(streams.accepting());
  streams.StopAccepting();
  EXPECT_FALSE(streams.accepting());
  EXPECT_EQ(streams.open(), 1);
}

}  // namespace
}  // namespace tandem::router

#include "cli/control_socket.h"

#include <cstdlib>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "cli/cluster_note.h"
#include "common/base/status.h"
#include "tests/support/temp_dir.h"

namespace tandem::cli {
namespace {

constexpr char kServer[] = "127.0.0.1:8123";

class ControlSocketTest : public testing::Test {
 protected:
  ControlSocketTest() { setenv("XDG_RUNTIME_DIR", home_.path().c_str(), 1); }

  const TempDir home_;
};

TEST_F(ControlSocketTest, AnswersWhatItIsAsked) {
  ASSERT_TRUE(WriteClusterNote(kServer, {"127.0.0.1:1", "s"}).ok());
  auto control = ControlSocket::Listen(
      kServer, [](const nlohmann::json& request) -> absl::StatusOr<nlohmann::json> {
        if (request.value("n", 0) < 0) return InvalidArgument("n must not be negative");
        return nlohmann::json{{"twice", 2 * request.value("n", 0)}};
      });
  ASSERT_TRUE(control.ok()) << control.status();
  std::thread up([&control] {
    for (int i = 0; i < 2; ++i) (*control)->Answer();
  });
  const auto answer = AskUp(kServer, {{"n", 21}});
  const auto refused = AskUp(kServer, {{"n", -1}});
  up.join();
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ((*answer)["twice"], 42);
  EXPECT_EQ(refused.status(), absl::FailedPreconditionError("n must not be negative"));
  // One that was killed leaves its socket behind; the next one takes its place.
  EXPECT_TRUE(ControlSocket::Listen(kServer, nullptr).ok());
}

TEST_F(ControlSocketTest, NobodyThere) {
  EXPECT_TRUE(absl::IsNotFound(AskUp(kServer, {{"n", 1}}).status()));
  EXPECT_FALSE(ControlSocket::Listen(kServer, nullptr).ok());  // no note, no directory to trust
  ASSERT_TRUE(WriteClusterNote(kServer, {"127.0.0.1:1", "s"}).ok());
  EXPECT_TRUE(absl::IsNotFound(AskUp(kServer, {{"n", 1}}).status()));
}

TEST_F(ControlSocketTest, APathThatIsTooLongIsNamed) {
  const std::string deep = home_.path() + "/" + std::string(100, 'd');
  std::filesystem::create_directories(deep);
  setenv("XDG_RUNTIME_DIR", deep.c_str(), 1);
  ASSERT_TRUE(WriteClusterNote(kServer, {"127.0.0.1:1", "s"}).ok());
  EXPECT_THAT(ControlSocket::Listen(kServer, nullptr).status().ToString(),
              testing::HasSubstr("107 bytes"));
}

}  // namespace
}  // namespace tandem::cli

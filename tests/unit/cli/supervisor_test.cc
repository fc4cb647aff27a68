#include "cli/supervisor.h"

#include <csignal>
#include <sys/wait.h>
#include <unistd.h>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace tandem::cli {
namespace {

using testing::HasSubstr;

const std::map<std::string, std::string> kNothing;

std::vector<std::string> Shell(const std::string& script) { return {"/bin/sh", "-c", script}; }

// Plain lines on stderr, as it stands when they are shown.
UpScreen screen({.out = stderr});

// Steps until `condition` holds; the test's own time limit bounds it.
template <typename Condition>
void StepUntil(Supervisor* supervisor, Condition condition) {
  while (!condition()) supervisor->Step(absl::Milliseconds(100));
}

TEST(ParseListeningLineTest, TakesTheOneLine) {
  const auto line = ParseListeningLine("listening 127.0.0.1:81 metrics 127.0.0.1:82");
  ASSERT_TRUE(line.has_value());
  EXPECT_EQ(line->address, "127.0.0.1:81");
  EXPECT_EQ(line->metrics_address, "127.0.0.1:82");
  EXPECT_FALSE(ParseListeningLine("listening 127.0.0.1:81").has_value());
  EXPECT_FALSE(ParseListeningLine("hello there 1 2").has_value());
}

TEST(ChildProcessTest, EnvironmentOutputAndExitCode) {
  auto child = ChildProcess::Start(Shell("echo \"$GREETING\"; printf tail; exit 3"),
                                   {{"GREETING", "hello world"}});
  ASSERT_TRUE(child.ok()) << child.status();
  const int status = (*child)->Wait();
  EXPECT_EQ(WEXITSTATUS(status), 3);
  EXPECT_THAT((*child)->out().ReadLines(), testing::ElementsAre("hello world", "tail"));
  EXPECT_EQ(DescribeWaitStatus(status), "exit code 3");
}

TEST(ChildProcessTest, MissingProgramIsAnError) {
  const auto child = ChildProcess::Start({"/no/such/program"}, {});
  ASSERT_FALSE(child.ok());
  EXPECT_THAT(std::string(child.status().message()), HasSubstr("/no/such/program"));
}

TEST(ChildProcessTest, DestructorKills) {
  auto child = ChildProcess::Start(Shell("exec sleep 1000"), {});
  ASSERT_TRUE(child.ok());
  const pid_t pid = (*child)->pid();
  child->reset();
  EXPECT_EQ(kill(pid, 0), -1);
}

TEST(SupervisorTest, SeesListeningAndRestartsTheDead) {
  Supervisor supervisor(std::map<std::string, std::string>{{"WHO", "127.0.0.1"}}, &screen);
  ASSERT_TRUE(
      supervisor.Start({"w", Shell("echo \"listening $WHO:1 metrics $WHO:2\"; exec sleep 1000")})
          .ok());
  StepUntil(&supervisor, [&] { return supervisor.listening("w").has_value(); });
  EXPECT_EQ(supervisor.listening("w")->address, "127.0.0.1:1");
  supervisor.RestartTheDead();
  supervisor.SetArguments("w", Shell("echo 'listening new:1 metrics new:2'; exit 7"));
  // The first life is ended from outside; the next ones say something else and end by themselves.
  testing::internal::CaptureStderr();
  ASSERT_EQ(system("pkill -P $PPID -x sleep"), 0);
  StepUntil(&supervisor, [&] { return supervisor.deaths().size() >= 2; });
  EXPECT_THAT(testing::internal::GetCapturedStderr(), HasSubstr("starting it again"));
  EXPECT_EQ(WTERMSIG(supervisor.deaths()[0].wait_status), SIGTERM);
  EXPECT_EQ(WEXITSTATUS(supervisor.deaths()[1].wait_status), 7);
}

// A worker whose CUDA device failed ends with this exit code (engine/device/cuda/cuda_check.h).
TEST(SupervisorTest, AWorkerWhoseDeviceFailedIsStartedAgain) {
  Supervisor supervisor(kNothing, &screen);
  supervisor.RestartTheDead();
  testing::internal::CaptureStderr();
  ASSERT_TRUE(supervisor
                  .Start({"w", Shell("echo 'listening a:1 metrics a:2'; "
                                     "echo 'FATAL kernel: injected fault (CUDA; step 3)' >&2; "
                                     "exit 75")})
                  .ok());
  StepUntil(&supervisor, [&] { return !supervisor.deaths().empty(); });
  supervisor.SetArguments("w", Shell("echo 'listening new:1 metrics new:2'; exec sleep 1000"));
  StepUntil(&supervisor, [&] { return supervisor.listening("w").has_value(); });
  EXPECT_EQ(supervisor.listening("w")->address, "new:1");
  EXPECT_EQ(WEXITSTATUS(supervisor.deaths()[0].wait_status), 75);
  EXPECT_THAT(supervisor.deaths()[0].last_line, HasSubstr("injected fault (CUDA; step 3)"));
  EXPECT_THAT(testing::internal::GetCapturedStderr(),
              HasSubstr("w ended (exit code 75); starting it again"));
}

TEST(SupervisorTest, DeathIsReportedWithItsLastLine) {
  Supervisor supervisor(kNothing, &screen);
  testing::internal::CaptureStderr();
  ASSERT_TRUE(supervisor.Start({"w", Shell("echo first >&2; echo port in use >&2; exit 1")}).ok());
  StepUntil(&supervisor, [&] { return !supervisor.deaths().empty(); });
  EXPECT_EQ(supervisor.deaths()[0].name, "w");
  EXPECT_EQ(supervisor.deaths()[0].last_line, "port in use");
  // The last line is not shown: who reports the death says it.
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "w | first\n");
}

TEST(SupervisorTest, ALineOfTheLogIsNoReasonForADeath) {
  Supervisor supervisor(kNothing, &screen);
  testing::internal::CaptureStderr();
  ASSERT_TRUE(
      supervisor
          .Start({"w",
                  Shell("echo '2026-11-24T16:21:50.617Z info  decode-0: loading' >&2; kill -9 $$")})
          .ok());
  StepUntil(&supervisor, [&] { return !supervisor.deaths().empty(); });
  EXPECT_EQ(supervisor.deaths()[0].last_line, "");
  EXPECT_EQ(testing::internal::GetCapturedStderr(),
            "2026-11-24T16:21:50.617Z info  decode-0: loading\n");
}

TEST(SupervisorTest, AHeldChildIsStartedAgainOnceReleased) {
  Supervisor supervisor(kNothing, &screen);
  supervisor.RestartTheDead();
  ASSERT_TRUE(
      supervisor.Start({"w", Shell("echo 'listening a:1 metrics a:2'; exec sleep 1000")}).ok());
  StepUntil(&supervisor, [&] { return supervisor.listening("w").has_value(); });
  EXPECT_EQ(supervisor.StateOf("w"), "runs");
  supervisor.Hold("w");
  testing::internal::CaptureStderr();
  ASSERT_EQ(system("pkill -P $PPID -x sleep"), 0);
  StepUntil(&supervisor, [&] { return supervisor.StateOf("w") == "held out"; });
  // Longer than the first restart takes to be due.
  const absl::Time later = absl::Now() + absl::Milliseconds(400);
  StepUntil(&supervisor, [&] { return absl::Now() > later; });
  EXPECT_EQ(supervisor.StateOf("w"), "held out");
  EXPECT_THAT(testing::internal::GetCapturedStderr(), HasSubstr("tandem undrain"));
  supervisor.Release("w");
  StepUntil(&supervisor, [&] { return supervisor.listening("w").has_value(); });
}

TEST(SupervisorTest, ARetiredChildIsForgotten) {
  Supervisor supervisor(kNothing, &screen);
  supervisor.RestartTheDead();
  ASSERT_TRUE(supervisor.Start({"w", {"/bin/sleep", "1000"}}).ok());
  supervisor.Retire("w");
  StepUntil(&supervisor, [&] { return !supervisor.Has("w"); });
  EXPECT_EQ(supervisor.Names(), std::vector<std::string>{});
}

TEST(SupervisorTest, LoadingIsToldUntilTheChildListens) {
  Supervisor supervisor(kNothing, &screen);
  ASSERT_TRUE(supervisor
                  .Start({"w", Shell("echo 'loading 3 10'; read go; "
                                     "echo 'listening a:1 metrics a:2'; exec sleep 1000")})
                  .ok());
  // stdin is /dev/null, so that `read` ends at once: both lines come, in order.
  StepUntil(&supervisor, [&] { return supervisor.listening("w").has_value(); });
  EXPECT_EQ(supervisor.loading().worker_bytes(), 10u);
  EXPECT_FALSE(supervisor.loading().active());
}

TEST(SupervisorTest, WatchedDescriptorsAreDealtWith) {
  Supervisor supervisor(kNothing, &screen);
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  char got = 0;
  supervisor.Watch(ends[0], [&] { ASSERT_EQ(read(ends[0], &got, 1), 1); });
  ASSERT_EQ(write(ends[1], "x", 1), 1);
  StepUntil(&supervisor, [&] { return got == 'x'; });
  supervisor.Unwatch(ends[0]);
  ASSERT_EQ(write(ends[1], "y", 1), 1);
  supervisor.Step(absl::ZeroDuration());
  EXPECT_EQ(got, 'x');
  close(ends[0]);
  close(ends[1]);
}

TEST(SupervisorTest, StopIsCleanWhereChildrenListenToTerm) {
  Supervisor supervisor(kNothing, &screen);
  ASSERT_TRUE(supervisor
                  .Start({"good", Shell("trap 'exit 0' TERM; echo 'listening a:1 metrics a:2'; "
                                        "while :; do sleep 0.05; done")})
                  .ok());
  StepUntil(&supervisor, [&] { return supervisor.listening("good").has_value(); });
  EXPECT_EQ(supervisor.Stop({"good"}, absl::Seconds(100)), StopOutcome::kClean);
  EXPECT_EQ(supervisor.Stop({"good"}, absl::Seconds(100)), StopOutcome::kClean);
}

TEST(SupervisorTest, StopIsCleanWhereAChildHasNotComeToHandlingSignals) {
  Supervisor supervisor(kNothing, &screen);
  ASSERT_TRUE(supervisor.Start({"new", {"/bin/sleep", "1000"}}).ok());
  EXPECT_EQ(supervisor.Stop({"new"}, absl::Seconds(100)), StopOutcome::kClean);
}

TEST(SupervisorTest, StopKillsTheDeaf) {
  Supervisor supervisor(kNothing, &screen);
  ASSERT_TRUE(supervisor
                  .Start({"deaf", Shell("trap '' TERM; echo 'listening a:1 metrics a:2'; "
                                        "while :; do sleep 0.05; done")})
                  .ok());
  StepUntil(&supervisor, [&] { return supervisor.listening("deaf").has_value(); });
  testing::internal::CaptureStderr();
  EXPECT_EQ(supervisor.Stop({"deaf"}, absl::Milliseconds(50)), StopOutcome::kNotClean);
  EXPECT_THAT(testing::internal::GetCapturedStderr(), HasSubstr("deaf did not stop in time"));
}

TEST(SupervisorTest, StepReturnsSignals) {
  Supervisor supervisor(kNothing, &screen);
  raise(SIGTERM);
  EXPECT_EQ(supervisor.Step(absl::InfiniteDuration()), SIGTERM);
  EXPECT_EQ(supervisor.Step(absl::ZeroDuration()), 0);
}

}  // namespace
}  // namespace tandem::cli

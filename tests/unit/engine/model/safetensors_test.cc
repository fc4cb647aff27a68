#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "fmt/format.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "engine/model/checkpoint.h"
#include "tests/support/paths.h"

namespace tandem::engine {
namespace {

using ::testing::HasSubstr;

std::string FileOf(const std::string& header, size_t data_bytes) {
  std::string file(8, '\0');
  for (size_t i = 0; i < 8; ++i) file[i] = static_cast<char>(header.size() >> (8 * i));
  return file + header + std::string(data_bytes, '\1');
}

absl::StatusOr<SafetensorsIndex> Parse(const std::string& file) {
  return ParseSafetensors(std::as_bytes(std::span(file)), file.size(), "m.safetensors");
}

constexpr char kGood[] =
    R"({"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},)"
    R"("b":{"dtype":"F32","shape":[],"data_offsets":[12,16]}})";

TEST(SafetensorsTest, ReadsEntries) {
  const auto index = Parse(FileOf(kGood, 16));
  ASSERT_OK(index);
  ASSERT_EQ(index->size(), 2u);
  const SafetensorsEntry& a = index->at("a");
  EXPECT_EQ(a.dtype, "BF16");
  EXPECT_EQ(ShapeText(a.shape), "[2, 3]");
  EXPECT_EQ(a.begin, 8 + sizeof(kGood) - 1);
  EXPECT_EQ(a.end - a.begin, 12u);
}

TEST(SafetensorsTest, EveryTruncationIsAnError) {
  const std::string file = FileOf(kGood, 16);
  for (size_t size = 0; size < file.size(); ++size) {
    EXPECT_FALSE(Parse(file.substr(0, size)).ok()) << size;
  }
  EXPECT_FALSE(Parse(file + "x").ok());
}

TEST(SafetensorsTest, ErrorsNameFileAndTensor) {
  const auto entry = [](const std::string& body) { return "{\"w\":{" + body + "}}"; };
  const struct {
    std::string header;
    std::string problem;
  } cases[] = {
      {"[]", "JSON object"},
      {"{", "JSON object"},
      {std::string(5000, '['), "JSON object"},
      {R"({"w":3})", "must be an object"},
      {entry(R"("shape":[1],"data_offsets":[0,4])"), "dtype is missing"},
      {entry(R"("dtype":"F31","shape":[1],"data_offsets":[0,4])"), "F31"},
      {entry(R"("dtype":"F32","data_offsets":[0,4])"), "shape is missing"},
      {entry(R"("dtype":"F32","shape":[-1],"data_offsets":[0,4])"), "shape must hold"},
      {entry(R"("dtype":"F32","shape":[1.5],"data_offsets":[0,4])"), "shape must hold"},
      {entry(R"("dtype":"F32","shape":[1],"data_offsets":[0])"), "data_offsets must be"},
      {entry(R"("dtype":"F32","shape":[1],"data_offsets":[-4,0])"), "data_offsets must be"},
      {entry(R"("dtype":"F32","shape":[1],"data_offsets":[4,0])"), "do not lie"},
      {entry(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])"), "do not lie"},
      {entry(R"("dtype":"F32","shape":[2],"data_offsets":[0,4])"), "does not take"},
      {entry(R"("dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,4])"),
       "does not take"},
      {entry(R"("dtype":"F16","shape":[1],"data_offsets":[0,2])"), "cover 2 of 4"},
      {entry(R"("dtype":"F16","shape":[1],"data_offsets":[2,4])"), "after a gap"},
      {R"({"u":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
       R"("w":{"dtype":"F16","shape":[1],"data_offsets":[2,4]}})",
       "inside"},
      {R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
       R"("w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
       "listed twice"},
  };
  for (const auto& c : cases) {
    const auto index = Parse(FileOf(c.header, 4));
    ASSERT_FALSE(index.ok()) << c.header;
    const std::string message(index.status().message());
    EXPECT_THAT(message, HasSubstr("m.safetensors"));
    EXPECT_THAT(message, HasSubstr(c.problem));
    if (c.problem != "JSON object" && c.problem != "cover 2 of 4") {
      EXPECT_THAT(message, HasSubstr("\"w\"")) << c.header;
    }
  }
  std::string huge = FileOf(kGood, 16);
  std::memset(huge.data(), 0xff, 8);
  EXPECT_THAT(Parse(huge).status().ToString(), HasSubstr("does not fit"));
}

// Whatever is parsed lies inside the file.
TEST(SafetensorsTest, RandomDamageNeverPointsOutside) {
  std::mt19937 random(3);
  const std::string good = FileOf(kGood, 16);
  int parsed = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string file = good;
    for (unsigned n = random() % 4; n-- > 0;) {
      file[random() % file.size()] = static_cast<char>(random());
    }
    const auto index = Parse(file);
    if (!index.ok()) continue;
    ++parsed;
    for (const auto& [name, entry] : *index) {
      ASSERT_LE(entry.begin, entry.end);
      ASSERT_LE(entry.end, file.size());
    }
  }
  EXPECT_GT(parsed, 100);
}

class CheckpointTest : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = ::testing::TempDir() + "checkpoint_test_" +
           ::testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::remove_all(dir_);
    std::filesystem::create_directories(dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  void Write(const std::string& name, const std::string& bytes) {
    std::ofstream(dir_ + "/" + name, std::ios::binary) << bytes;
  }
  static std::string OneTensor(const std::string& name) {
    return FileOf(
        fmt::format(R"({{"{}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}})", name), 4);
  }

  std::string dir_;
};

TEST_F(CheckpointTest, ReadsShards) {
  Write("one.safetensors", OneTensor("a"));
  Write("two.safetensors", OneTensor("b"));
  Write("model.safetensors.index.json",
        R"({"weight_map":{"a":"one.safetensors","b":"two.safetensors"}})");
  const auto checkpoint = Checkpoint::Open(dir_);
  ASSERT_OK(checkpoint);
  EXPECT_EQ(checkpoint->Names().size(), 2u);
  EXPECT_OK(checkpoint->Get("b"));
  EXPECT_THAT(checkpoint->Get("c").status().ToString(), HasSubstr("\"c\" is missing"));
}

TEST_F(CheckpointTest, RefusesBrokenShardIndexes) {
  EXPECT_THAT(Checkpoint::Open(dir_).status().ToString(), HasSubstr("holds neither"));
  Write("one.safetensors", OneTensor("a"));
  const auto with_index = [&](const std::string& json) {
    Write("model.safetensors.index.json", json);
    return Checkpoint::Open(dir_).status().ToString();
  };
  EXPECT_THAT(with_index("{"), HasSubstr("weight_map"));
  EXPECT_THAT(with_index(R"({"weight_map":{}})"), HasSubstr("empty"));
  EXPECT_THAT(with_index(R"({"weight_map":{"a":"../one.safetensors"}})"), HasSubstr("file name"));
  EXPECT_THAT(with_index(R"({"weight_map":{"a":7}})"), HasSubstr("file name"));
  EXPECT_THAT(with_index(R"({"weight_map":{"a":"two.safetensors"}})"), HasSubstr("no such file"));
  EXPECT_THAT(with_index(R"({"weight_map":{"b":"one.safetensors"}})"),
              HasSubstr("\"b\" is not in one.safetensors"));
}

}  // namespace
}  // namespace tandem::engine

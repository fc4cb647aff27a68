#include "engine/model/model_digest.h"

#include <algorithm>
#include <string_view>

#include "fmt/format.h"

#include "common/base/block_hash.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace tandem::engine {
namespace {

constexpr size_t kSamples = 64;
constexpr size_t kSampleBytes = 4096;

std::string_view Text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

size_t DataBegin(const Checkpoint::File& file) {
  size_t begin = file.mapping.bytes().size();
  for (const auto& [name, entry] : file.index) begin = std::min(begin, entry.begin);
  return begin;
}

}  // namespace

absl::StatusOr<std::string> CheckpointDigest(const std::string& model_dir,
                                             const Checkpoint& checkpoint) {
  TANDEM_ASSIGN_OR_RETURN(const std::string config, ReadFile(model_dir + "/config.json"));
  std::string all = HashBytes(config).ToBytes();
  // All samples at once: one after the other, a disk far away takes milliseconds for each.
  for (const Checkpoint::File& file : checkpoint.files()) {
    const size_t data_begin = DataBegin(file);
    const size_t data_bytes = file.mapping.bytes().size() - data_begin;
    for (size_t i = 0; i < kSamples; ++i) {
      file.mapping.Prefetch(data_begin + data_bytes / kSamples * i, kSampleBytes);
    }
  }
  for (const Checkpoint::File& file : checkpoint.files()) {
    const std::span<const std::byte> bytes = file.mapping.bytes();
    const size_t data_begin = DataBegin(file);
    all += fmt::format("{}:{}:", file.path.substr(file.path.rfind('/') + 1), bytes.size());
    all += HashBytes(Text(bytes.first(data_begin))).ToBytes();
    const std::span<const std::byte> data = bytes.subspan(data_begin);
    for (size_t i = 0; i < kSamples; ++i) {
      const size_t at = data.size() / kSamples * i;
      const size_t length = std::min(kSampleBytes, data.size() - at);
      all += HashBytes(Text(data.subspan(at, length))).ToBytes();
    }
  }
  return HashBytes(all).ToHex();
}

absl::StatusOr<std::string> DummyDigest(const std::string& model_dir, uint64_t seed) {
  TANDEM_ASSIGN_OR_RETURN(const std::string config, ReadFile(model_dir + "/config.json"));
  return HashBytes(fmt::format("dummy:{}:{}", seed, config)).ToHex();
}

}  // namespace tandem::engine

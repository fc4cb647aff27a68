#include "common/base/model_digest.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include "common/base/block_hash.h"
#include "common/base/checkpoint_quantisation.h"
#include "common/base/file.h"
#include "common/base/safetensors.h"
#include "common/base/status.h"
#include "common/base/weight_files.h"

namespace tandem {
namespace {

constexpr size_t kSamples = 64;
constexpr size_t kSampleBytes = 4096;
constexpr size_t kLengthBytes = 8;  // of a safetensors header's length

// One open weight file: header and data.
class WeightFile {
 public:
  static absl::StatusOr<WeightFile> Open(const std::string& path) {
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
      return errno == ENOENT ? NotFound("{}: no such file", path)
                             : InvalidArgument("{}: cannot be opened: {}", path, strerror(errno));
    }
    WeightFile file(path, fd);
    TANDEM_RETURN_IF_ERROR(file.Measure());
    return file;
  }
  WeightFile(WeightFile&& other) noexcept
      : path_(std::move(other.path_)),
        fd_(std::exchange(other.fd_, -1)),
        bytes_(other.bytes_),
        data_begin_(other.data_begin_) {}
  WeightFile& operator=(WeightFile&&) = delete;
  ~WeightFile() {
    if (fd_ >= 0) close(fd_);
  }

  size_t bytes() const { return bytes_; }
  size_t data_begin() const { return data_begin_; }
  // Has the disk fetch the samples, which will be wanted soon; does not wait.
  void PrefetchSamples() const {
    for (size_t i = 0; i < kSamples; ++i) {
      posix_fadvise(fd_, static_cast<off_t>(SampleBegin(i)), kSampleBytes, POSIX_FADV_WILLNEED);
    }
  }
  absl::StatusOr<std::string> ReadHeader() const { return Read(0, data_begin_); }
  absl::StatusOr<std::string> ReadSample(size_t i) const {
    const size_t begin = SampleBegin(i);
    return Read(begin, std::min(kSampleBytes, bytes_ - begin));
  }

 private:
  WeightFile(std::string path, int fd) : path_(std::move(path)), fd_(fd) {}

  absl::Status Measure() {
    struct stat info;
    if (fstat(fd_, &info) != 0 || !S_ISREG(info.st_mode)) {
      return InvalidArgument("{}: not a regular file", path_);
    }
    bytes_ = static_cast<size_t>(info.st_size);
    if (bytes_ < kLengthBytes) return InvalidArgument("{}: truncated: {} bytes", path_, bytes_);
    TANDEM_ASSIGN_OR_RETURN(const std::string length, Read(0, kLengthBytes));
    uint64_t header = 0;
    for (size_t i = kLengthBytes; i-- > 0;) header = header << 8 | static_cast<uint8_t>(length[i]);
    if (header > kMaxSafetensorsHeaderBytes || header > bytes_ - kLengthBytes) {
      return InvalidArgument("{}: truncated or not safetensors", path_);
    }
    data_begin_ = kLengthBytes + header;
    return absl::OkStatus();
  }

  size_t SampleBegin(size_t i) const { return data_begin_ + (bytes_ - data_begin_) / kSamples * i; }

  absl::StatusOr<std::string> Read(size_t offset, size_t bytes) const {
    std::string out(bytes, '\0');
    for (size_t done = 0; done < bytes;) {
      const ssize_t n =
          pread(fd_, out.data() + done, bytes - done, static_cast<off_t>(offset + done));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) {
        return InvalidArgument("{}: cannot be read at byte {}: {}", path_, offset + done,
                               n < 0 ? strerror(errno) : "it has become shorter");
      }
      done += static_cast<size_t>(n);
    }
    return out;
  }

  std::string path_;
  int fd_;
  size_t bytes_ = 0;
  size_t data_begin_ = 0;
};

}  // namespace

absl::StatusOr<std::string> CheckpointDigest(const std::string& model_dir) {
  TANDEM_ASSIGN_OR_RETURN(const std::string config, ReadFile(model_dir + "/config.json"));
  TANDEM_ASSIGN_OR_RETURN(const WeightFiles listed, ListWeightFiles(model_dir));
  std::vector<WeightFile> files;
  for (const std::string& name : listed.names) {
    TANDEM_ASSIGN_OR_RETURN(WeightFile file, WeightFile::Open(model_dir + "/" + name));
    files.push_back(std::move(file));
  }
  // All samples at once: one after the other, a disk far away takes milliseconds for each.
  for (const WeightFile& file : files) file.PrefetchSamples();
  std::string all = HashBytes(config).ToBytes();
  for (const std::string& path : CheckpointQuantisation::Files(model_dir)) {
    TANDEM_ASSIGN_OR_RETURN(const std::string quantisation, ReadFile(path));
    all += HashBytes(quantisation).ToBytes();
  }
  auto name = listed.names.begin();
  for (const WeightFile& file : files) {
    all += fmt::format("{}:{}:", *name++, file.bytes());
    TANDEM_ASSIGN_OR_RETURN(const std::string header, file.ReadHeader());
    all += HashBytes(header).ToBytes();
    for (size_t i = 0; i < kSamples; ++i) {
      TANDEM_ASSIGN_OR_RETURN(const std::string sample, file.ReadSample(i));
      all += HashBytes(sample).ToBytes();
    }
  }
  return HashBytes(all).ToHex();
}

absl::StatusOr<std::string> DummyDigest(const std::string& model_dir, uint64_t seed) {
  TANDEM_ASSIGN_OR_RETURN(const std::string config, ReadFile(model_dir + "/config.json"));
  return HashBytes(fmt::format("dummy:{}:{}", seed, config)).ToHex();
}

}  // namespace tandem

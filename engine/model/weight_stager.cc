#include "engine/model/weight_stager.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace tandem::engine {
namespace {

// Large enough for a disk and for the link to the device; a row that is longer is a piece all the
// same.
constexpr size_t kPieceBytes = size_t{4} << 20;
constexpr size_t kBuffersPerThread = 2;
// A thread for so many bytes: small models need few.
constexpr size_t kBytesPerThread = size_t{32} << 20;

}  // namespace

void WeightStager::Pack(const TensorView& view, size_t first_column, void* packed) {
  const auto rows = static_cast<size_t>(view.shape[0]);
  const size_t row_bytes = view.bytes / std::max<size_t>(rows, 1);
  const size_t step = std::max<size_t>(1, kPieceBytes / std::max<size_t>(row_bytes, 1));
  for (size_t row = 0; row < rows; row += step) {
    const size_t count = std::min(step, rows - row);
    pieces_.push_back({.file = view.file,
                       .offset = view.FileOffset() + row * row_bytes,
                       .bytes = count * row_bytes,
                       .progress = count * row_bytes,
                       .element = view.element,
                       .rows = count,
                       .k = row_bytes / ElementSize(view.element),
                       .first_column = first_column + row,
                       .packed = packed});
  }
  total_ += view.bytes;
}

void WeightStager::Pack(QuantisedLinear linear, size_t first_column, void* packed) {
  const size_t row_bytes = linear.inputs() * sizeof(float);
  quantised_.push_back({std::move(linear), std::nullopt, {}});
  PackRows(quantised_.back(), row_bytes, first_column, packed);
}

void WeightStager::PackInt4(QuantisedLinear linear, const Int4Shape& shape,
                            std::vector<int32_t> order, size_t first_column, void* packed) {
  quantised_.push_back({std::move(linear), shape, std::move(order)});
  PackRows(quantised_.back(), (shape.words() + shape.groups()) * sizeof(uint32_t), first_column,
           packed);
}

void WeightStager::PackRows(const Quantised& quantised, size_t row_bytes, size_t first_column,
                            void* packed) {
  const QuantisedLinear& linear = quantised.linear;
  const size_t rows = linear.outputs();
  const size_t step = std::max<size_t>(1, kPieceBytes / std::max<size_t>(row_bytes, 1));
  for (size_t row = 0; row < rows; row += step) {
    const size_t count = std::min(step, rows - row);
    pieces_.push_back({.quantised = &quantised,
                       .first_row = row,
                       .bytes = count * row_bytes,
                       .progress = linear.Bytes() / rows * count,
                       .element = Element::kFloat32,
                       .rows = count,
                       .k = linear.inputs(),
                       .first_column = first_column + row,
                       .packed = packed});
  }
  total_ += rows * row_bytes;
}

void WeightStager::Copy(const TensorView& view, void* to) {
  for (size_t at = 0; at < view.bytes; at += kPieceBytes) {
    const size_t bytes = std::min(kPieceBytes, view.bytes - at);
    pieces_.push_back({.file = view.file,
                       .offset = view.FileOffset() + at,
                       .bytes = bytes,
                       .progress = bytes,
                       .copy = static_cast<std::byte*>(to) + at});
  }
  total_ += view.bytes;
}

// What one thread has.
class WeightStager::Reader {
 public:
  Reader(const WeightStager* stager, std::byte* staging, size_t buffer_bytes)
      : stager_(stager), stream_(stager->device_->NewStream()) {
    for (size_t i = 0; i < kBuffersPerThread; ++i) buffers_[i].data = staging + i * buffer_bytes;
  }
  ~Reader() { stream_->Synchronize(); }

  absl::Status Take(const Piece& piece) {
    Buffer& buffer = buffers_[next_];
    next_ = (next_ + 1) % kBuffersPerThread;
    // What was in it before must have left it.
    if (buffer.sent != nullptr) {
      while (!buffer.sent->WaitFor(absl::Seconds(1))) {
      }
    }
    if (piece.quantised != nullptr) {
      Take(*piece.quantised, piece, buffer.data);
    } else {
      const absl::Status read = piece.file->Read(piece.offset, {buffer.data, piece.bytes});
      if (!read.ok()) return read;
    }
    if (piece.quantised != nullptr && piece.quantised->shape.has_value()) {
      // Take() has given it to the stream.
    } else if (piece.packed == nullptr) {
      stream_->CopyToDevice(piece.copy, buffer.data, piece.bytes);
    } else {
      stager_->ops_->PackWeightRows(buffer.data, piece.element, piece.rows, piece.k,
                                    piece.first_column, piece.packed, stream_.get());
    }
    buffer.sent = stager_->device_->NewEvent();
    stream_->Record(buffer.sent.get());
    return absl::OkStatus();
  }

 private:
  // Into `to`: dequantised; or as it is, and from there to the device.
  void Take(const Quantised& quantised, const Piece& piece, std::byte* to) {
    if (!quantised.shape.has_value()) {
      quantised.linear.Dequantise(piece.first_row, piece.rows, reinterpret_cast<float*>(to));
      return;
    }
    auto* values = reinterpret_cast<uint32_t*>(to);
    uint32_t* scales = values + piece.rows * quantised.shape->words();
    quantised.linear.PackRows(piece.first_row, piece.rows, quantised.order, values, scales);
    stager_->ops_->PackInt4Rows(*quantised.shape, {values, scales, piece.first_column, piece.rows},
                                piece.packed, stream_.get());
  }

  struct Buffer {
    std::byte* data = nullptr;
    std::shared_ptr<Event> sent;  // null: never
  };

  const WeightStager* const stager_;
  const std::unique_ptr<Stream> stream_;
  std::array<Buffer, kBuffersPerThread> buffers_;
  size_t next_ = 0;
};

absl::Status WeightStager::Run(int threads, LoadProgress* progress) {
  if (pieces_.empty()) return absl::OkStatus();
  std::sort(pieces_.begin(), pieces_.end(), [](const Piece& a, const Piece& b) {
    if (a.file != b.file) return std::less<>()(a.file, b.file);
    return a.offset < b.offset;
  });
  size_t buffer_bytes = 0;
  for (const Piece& piece : pieces_) buffer_bytes = std::max(buffer_bytes, piece.bytes);
  buffer_bytes = (buffer_bytes + 4095) / 4096 * 4096;
  const size_t count =
      std::clamp<size_t>(total_ / kBytesPerThread, 1, static_cast<size_t>(std::max(threads, 1)));
  absl::StatusOr<engine::Buffer> staging =
      device_->AllocateStaging(count * kBuffersPerThread * buffer_bytes);
  if (!staging.ok()) return staging.status();

  std::atomic<size_t> next = 0;
  std::atomic<bool> failed = false;
  absl::Mutex mutex;
  absl::Status status;
  const auto work = [&](size_t thread) {
    Reader reader(this, staging->as<std::byte>() + thread * kBuffersPerThread * buffer_bytes,
                  buffer_bytes);
    for (size_t i = next++; i < pieces_.size() && !failed; i = next++) {
      const absl::Status taken = reader.Take(pieces_[i]);
      if (!taken.ok()) {
        absl::MutexLock lock(&mutex);
        status.Update(taken);
        failed = true;
        return;
      }
      progress->Add(pieces_[i].progress);
    }
  };
  std::vector<std::thread> others;
  for (size_t i = 1; i < count; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& thread : others) thread.join();
  pieces_.clear();
  quantised_.clear();
  return status;
}

}  // namespace tandem::engine

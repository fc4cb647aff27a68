// Any bytes as a safetensors file: parsing must end in a Status or in tensors inside the file.
#include <cstddef>
#include <cstdint>
#include <span>

#include "common/base/check.h"
#include "common/base/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto index = tandem::ParseSafetensors(std::as_bytes(std::span(data, size)), size, "fuzz");
  if (!index.ok()) return 0;
  size_t total = 0;
  for (const auto& [name, entry] : *index) {
    TANDEM_CHECK(entry.begin <= entry.end && entry.end <= size, "{} points outside", name);
    for (size_t i = entry.begin; i < entry.end; ++i) total += data[i];  // every byte is readable
  }
  volatile size_t sink = total;
  (void)sink;
  return 0;
}

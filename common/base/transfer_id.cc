#include "common/base/transfer_id.h"

#include <cerrno>
#include <cstring>
#include <sys/random.h>

#include "common/base/check.h"

namespace tandem {

std::string RandomBytes(size_t size) {
  std::string bytes(size, '\0');
  size_t done = 0;
  while (done < size) {
    const ssize_t n = getrandom(bytes.data() + done, size - done, 0);
    if (n < 0 && errno == EINTR) continue;
    TANDEM_CHECK(n > 0, "getrandom: {}", std::strerror(errno));
    done += static_cast<size_t>(n);
  }
  return bytes;
}

uint64_t RandomUint64() {
  uint64_t value;
  std::memcpy(&value, RandomBytes(sizeof(value)).data(), sizeof(value));
  return value;
}

TransferId TransferId::Random() { return TransferId{Hash128{RandomUint64(), RandomUint64()}}; }

}  // namespace tandem

#include "common/auth/certificate_files.h"

#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "spdlog/spdlog.h"

#include "common/base/status.h"

namespace tandem {

CertificateFiles::CertificateFiles(const TlsFiles& files, TlsFiles flags,
                                   std::function<void(absl::Time)> on_certificate)
    : files_(files), flags_(std::move(flags)), on_certificate_(std::move(on_certificate)) {}

absl::StatusOr<std::shared_ptr<CertificateFiles>> CertificateFiles::Open(
    const TlsFiles& files, TlsFiles flags, std::function<void(absl::Time)> on_certificate) {
  std::shared_ptr<CertificateFiles> opened(
      new CertificateFiles(files, std::move(flags), std::move(on_certificate)));
  std::vector<std::string> paths = {files.certificate, files.key};
  if (!files.ca.empty()) paths.push_back(files.ca);
  FileWatch::Contents contents = FileWatch::Read(paths);
  TANDEM_RETURN_IF_ERROR(opened->Take(contents));
  opened->watch_ = std::make_unique<FileWatch>(
      std::move(paths), std::move(contents),
      [self = opened.get()](const FileWatch::Contents& now) { return self->Take(now); });
  return opened;
}

TlsTexts CertificateFiles::texts() const {
  absl::MutexLock lock(&mutex_);
  return texts_;
}

int CertificateFiles::AddListener(std::function<void()> listener) {
  absl::MutexLock lock(&listeners_mutex_);
  listeners_[next_listener_] = std::move(listener);
  return next_listener_++;
}

void CertificateFiles::RemoveListener(int id) {
  absl::MutexLock lock(&listeners_mutex_);
  listeners_.erase(id);
}

absl::Status CertificateFiles::Take(const FileWatch::Contents& contents) {
  for (const auto& content : contents) TANDEM_RETURN_IF_ERROR(content.status());
  const absl::StatusOr<absl::Time> not_after =
      CheckCertificateAndKey(*contents[0], *contents[1], absl::Now());
  if (!not_after.ok()) {
    return InvalidArgument("{} {}, {} {}: {}", flags_.certificate, files_.certificate, flags_.key,
                           files_.key, MessageOf(not_after.status()));
  }
  const std::string ca = contents.size() > 2 ? *contents[2] : "";
  if (contents.size() > 2) {
    if (const absl::Status checked = CheckCertificates(ca); !checked.ok()) {
      return InvalidArgument("{} {}: {}", flags_.ca, files_.ca, MessageOf(checked));
    }
  }
  {
    absl::MutexLock lock(&mutex_);
    texts_ = {*contents[0], *contents[1], ca, texts_.generation + 1};
  }
  spdlog::info("TLS: the certificate of {} holds until {}", files_.certificate,
               absl::FormatTime("%Y-%m-%d %H:%M:%S UTC", *not_after, absl::UTCTimeZone()));
  if (on_certificate_) on_certificate_(*not_after);
  absl::MutexLock lock(&listeners_mutex_);
  for (const auto& [id, listener] : listeners_) listener();
  return absl::OkStatus();
}

}  // namespace tandem

#include "common/cuda/cuda_library.h"

#include <algorithm>
#include <cstdlib>
#include <dlfcn.h>
#include <filesystem>
#include <sstream>
#include <system_error>

#include "common/base/status.h"

namespace tandem::cuda {
namespace {

namespace fs = std::filesystem;

std::string Environment(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : "";
}

class Folders {
 public:
  void Add(const fs::path& folder) {
    std::error_code error;
    if (!fs::is_directory(folder, error)) return;
    const std::string name = folder.lexically_normal().string();
    if (std::find(names_.begin(), names_.end(), name) == names_.end()) names_.push_back(name);
  }

  // <site>/nvidia/*/lib: where PyPI's wheels of CUDA put theirs.
  void AddSitePackages(const fs::path& site) {
    for (const fs::path& part : Children(site / "nvidia", "")) Add(part / "lib");
  }

  // <prefix>/lib/python3*/{site,dist}-packages.
  void AddPythonPrefix(const fs::path& prefix) {
    for (const fs::path& python : Children(prefix / "lib", "python3")) {
      AddSitePackages(python / "site-packages");
      AddSitePackages(python / "dist-packages");
    }
  }

  // What lies in `folder` with names that begin so, in the order of names.
  static std::vector<fs::path> Children(const fs::path& folder, const std::string& prefix) {
    std::vector<fs::path> children;
    std::error_code error;
    for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
      if (it->path().filename().string().starts_with(prefix)) children.push_back(it->path());
    }
    std::sort(children.begin(), children.end());
    return children;
  }

  std::vector<std::string> names() const { return names_; }

 private:
  std::vector<std::string> names_;
};

void AddProgramsOwn(Folders* folders) {
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error);
  if (error) return;
  folders->Add(program.parent_path() / ".." / "lib");
  folders->Add(program.parent_path());
}

std::vector<std::string> ProgramsOwn() {
  Folders folders;
  AddProgramsOwn(&folders);
  return folders.names();
}

// Null where the folder has no such file or it cannot be loaded; `problems` then says why.
void* OpenIn(const std::string& folder, const std::string& file_name, std::string* problems) {
  const fs::path path = fs::path(folder) / file_name;
  std::error_code error;
  if (!fs::exists(path, error)) return nullptr;
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) *problems += fmt::format("; {}", dlerror());
  return library;
}

}  // namespace

std::vector<std::string> CudaLibraryFolders() {
  Folders folders;
  AddProgramsOwn(&folders);
  for (const char* name : {"CUDA_HOME", "CUDA_PATH"}) {
    if (const std::string home = Environment(name); !home.empty()) {
      folders.Add(fs::path(home) / "lib64");
    }
  }
  folders.Add("/usr/local/cuda/lib64");
  for (const fs::path& toolkit : Folders::Children("/usr/local", "cuda-")) {
    folders.Add(toolkit / "lib64");
  }
  for (const char* name : {"VIRTUAL_ENV", "CONDA_PREFIX"}) {
    if (const std::string prefix = Environment(name); !prefix.empty()) {
      folders.AddPythonPrefix(prefix);
    }
  }
  std::istringstream python_path(Environment("PYTHONPATH"));
  for (std::string site; std::getline(python_path, site, ':');) {
    if (!site.empty()) folders.AddSitePackages(site);
  }
  if (const std::string home = Environment("HOME"); !home.empty()) {
    folders.AddPythonPrefix(fs::path(home) / ".local");
  }
  for (const char* prefix : {"/usr/local", "/usr", "/opt/conda", "/opt/venv"}) {
    folders.AddPythonPrefix(prefix);
  }
  return folders.names();
}

absl::StatusOr<void*> OpenCudaLibrary(const std::string& file_name) {
  std::string problems;
  for (const std::string& folder : ProgramsOwn()) {
    if (void* library = OpenIn(folder, file_name, &problems)) return library;
  }
  if (void* library = dlopen(file_name.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
  const std::vector<std::string> folders = CudaLibraryFolders();
  for (const std::string& folder : folders) {
    if (void* library = OpenIn(folder, file_name, &problems)) return library;
  }
  return NotFound(
      "{} was not found. Looked in LD_LIBRARY_PATH, the system's libraries, {}{}. Install it "
      "(pip install nvidia-cublas nvidia-nccl-cu13), or put it beside the program in ../lib",
      file_name, fmt::join(folders, ", "), problems);
}

absl::StatusOr<void*> FindCudaSymbol(void* library, const char* name) {
  if (void* found = dlsym(library, name)) return found;
  return NotFound("{}: {}", name, dlerror());
}

}  // namespace tandem::cuda

#include "engine/device/cuda/cuda_device.h"

#include <cstdlib>
#include <cuda.h>
#include <filesystem>
#include <fstream>
#include <thread>
#include <unistd.h>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/cuda/cuda_library.h"
#include "engine/device/cuda/cuda_check.h"
#include "tests/support/paths.h"

namespace tandem::engine::cuda {
namespace {

using ::testing::HasSubstr;

constexpr size_t kMiB = size_t{1} << 20;

// What needs no card.

TEST(CudaRequirementsTest, ADriverServesItsOwnMajorVersion) {
  EXPECT_THAT(CheckDriver(0, 13000).ToString(), HasSubstr("no NVIDIA driver is installed"));
  EXPECT_THAT(CheckDriver(12080, 13000).ToString(),
              HasSubstr("supports CUDA 12.8, this program needs 13.0: install a newer driver"));
  EXPECT_OK(CheckDriver(13000, 13010));
  EXPECT_OK(CheckDriver(14000, 13000));
}

TEST(CudaRequirementsTest, CardsBeforeAmpereAreRefused) {
  EXPECT_THAT(CheckCard("Tesla T4", 75).ToString(),
              HasSubstr("Tesla T4 has compute capability 7.5; 8.0 is needed"));
  EXPECT_OK(CheckCard("NVIDIA A100", 80));
  EXPECT_OK(CheckCard("NVIDIA B200", 100));
}

TEST(CudaLibraryTest, FindsALibraryInSitePackagesAndSaysWhereItLooked) {
  const std::filesystem::path root =
      std::filesystem::temp_directory_path() / ("tandem-cuda-library-" + std::to_string(getpid()));
  const std::filesystem::path folder = root / "lib/python3.11/site-packages/nvidia/cu99/lib";
  std::filesystem::create_directories(folder);
  setenv("VIRTUAL_ENV", root.c_str(), 1);
  EXPECT_THAT(::tandem::cuda::CudaLibraryFolders(), ::testing::Contains(folder.string()));
  const auto missing = ::tandem::cuda::OpenCudaLibrary("libtandem-none.so.1");
  EXPECT_EQ(missing.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(missing.status().ToString(), HasSubstr("libtandem-none.so.1 was not found"));
  EXPECT_THAT(missing.status().ToString(), HasSubstr(folder.string()));
  // A file that is no library is named with the reason.
  std::ofstream(folder / "libtandem-broken.so.1") << "no library";
  EXPECT_THAT(::tandem::cuda::OpenCudaLibrary("libtandem-broken.so.1").status().ToString(),
              HasSubstr("libtandem-broken.so.1: "));
  unsetenv("VIRTUAL_ENV");
  std::filesystem::remove_all(root);
}

TEST(CudaLibraryTest, FindsFunctions) {
  const auto library = ::tandem::cuda::OpenCudaLibrary("libm.so.6");
  ASSERT_OK(library);
  double (*cosine)(double) = nullptr;
  ASSERT_OK(::tandem::cuda::FindCudaFunction(*library, "cos", &cosine));
  EXPECT_EQ(cosine(0), 1);
  EXPECT_EQ(::tandem::cuda::FindCudaFunction(*library, "no_such_function", &cosine).code(),
            absl::StatusCode::kNotFound);
}

TEST(CudaErrorTest, EndsTheProcessWithTheCallAndItsOwnExitCode) {
  EXPECT_EXIT(TANDEM_CUDA_CHECK(cudaErrorIllegalAddress), ::testing::ExitedWithCode(kCudaErrorExit),
              "cudaErrorIllegalAddress: an illegal memory access.*step 0");
}

class CudaDeviceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto device = CudaDevice::Open(0);
    if (!device.ok()) GTEST_SKIP() << device.status();
    device_ = *std::move(device);
  }
  // `bytes` of the device as the host sees them.
  std::vector<unsigned char> Read(const void* data, size_t bytes) {
    std::vector<unsigned char> out(bytes, 0xcd);
    const auto stream = device_->NewStream();
    stream->CopyToHost(out.data(), data, bytes);
    stream->Synchronize();
    return out;
  }
  // Work of some milliseconds: copies within the device.
  void Busy(Stream* stream, const Buffer& scratch, int copies) {
    for (int i = 0; i < copies; ++i) {
      TANDEM_CUDA_CHECK(cudaMemcpyAsync(scratch.data(), scratch.as<char>() + scratch.size() / 2,
                                        scratch.size() / 2, cudaMemcpyDeviceToDevice,
                                        static_cast<CudaStream*>(stream)->handle()));
    }
  }

  std::unique_ptr<CudaDevice> device_;
};

TEST_F(CudaDeviceTest, DescribesItself) {
  EXPECT_THAT(device_->Describe(), HasSubstr("cuda, "));
  EXPECT_GE(device_->compute_capability(), 80);
  EXPECT_GT(device_->multiprocessors(), 0);
  EXPECT_GT(device_->TotalMemory(), device_->AvailableMemory());
  std::printf("%s\n", device_->Describe().c_str());
}

TEST_F(CudaDeviceTest, MemoryIsZeroedAndGivenBack) {
  const size_t before = device_->AvailableMemory();
  for (int round = 0; round < 3; ++round) {
    const auto memory = device_->Allocate(64 * kMiB);
    ASSERT_OK(memory);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(memory->data()) % 256, 0u);
    const std::vector<unsigned char> bytes = Read(memory->data(), memory->size());
    EXPECT_EQ(std::count(bytes.begin(), bytes.end(), 0), static_cast<int64_t>(bytes.size()));
    TANDEM_CUDA_CHECK(cudaMemset(memory->data(), 0xff, memory->size()));
    TANDEM_CUDA_CHECK(cudaDeviceSynchronize());
  }
  EXPECT_NEAR(static_cast<double>(device_->AvailableMemory()), static_cast<double>(before),
              8.0 * kMiB);
  EXPECT_EQ(device_->Allocate(0)->data(), nullptr);
}

TEST_F(CudaDeviceTest, TooMuchMemoryIsAnErrorAndNotTheEnd) {
  const auto memory = device_->Allocate(2 * device_->TotalMemory());
  EXPECT_EQ(memory.status().code(), absl::StatusCode::kResourceExhausted);
  const auto pool = device_->AllocateKvPool(2 * device_->TotalMemory());
  EXPECT_EQ(pool.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(pool.status().ToString(), HasSubstr("--kv-cache-memory-bytes"));
  EXPECT_OK(device_->Allocate(kMiB));
}

TEST_F(CudaDeviceTest, ThePoolCanBeMappedThroughItsDescriptor) {
  const size_t bytes = 5 * kMiB + 12345;
  const size_t before = device_->AvailableMemory();
  {
    auto pool = device_->AllocateKvPool(bytes);
    ASSERT_OK(pool);
    ASSERT_GE(pool->fd(), 0) << "this card's pool cannot be shared";
    EXPECT_EQ(Read(pool->data(), bytes), std::vector<unsigned char>(bytes, 0));
    TANDEM_CUDA_CHECK(cudaMemset(pool->data(), 0x5a, bytes));
    TANDEM_CUDA_CHECK(cudaDeviceSynchronize());
    // As another process would.
    const auto driver = [](const char* name) {
      void* found = nullptr;
      cudaDriverEntryPointQueryResult result;
      TANDEM_CUDA_CHECK(
          cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result));
      return found;
    };
    CUmemGenericAllocationHandle handle;
    ASSERT_EQ(reinterpret_cast<decltype(&cuMemImportFromShareableHandle)>(
                  driver("cuMemImportFromShareableHandle"))(
                  &handle, reinterpret_cast<void*>(static_cast<intptr_t>(pool->fd())),
                  CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
              CUDA_SUCCESS);
    const size_t size = (bytes + 2 * kMiB - 1) / (2 * kMiB) * (2 * kMiB);
    CUdeviceptr address = 0;
    ASSERT_EQ(reinterpret_cast<decltype(&cuMemAddressReserve)>(driver("cuMemAddressReserve"))(
                  &address, size, 0, 0, 0),
              CUDA_SUCCESS);
    ASSERT_EQ(
        reinterpret_cast<decltype(&cuMemMap)>(driver("cuMemMap"))(address, size, 0, handle, 0),
        CUDA_SUCCESS);
    CUmemAccessDesc access = {};
    access.location = {CU_MEM_LOCATION_TYPE_DEVICE, 0};
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    ASSERT_EQ(reinterpret_cast<decltype(&cuMemSetAccess)>(driver("cuMemSetAccess"))(address, size,
                                                                                    &access, 1),
              CUDA_SUCCESS);
    EXPECT_EQ(Read(reinterpret_cast<void*>(address), bytes),
              std::vector<unsigned char>(bytes, 0x5a));
    reinterpret_cast<decltype(&cuMemUnmap)>(driver("cuMemUnmap"))(address, size);
    reinterpret_cast<decltype(&cuMemAddressFree)>(driver("cuMemAddressFree"))(address, size);
    reinterpret_cast<decltype(&cuMemRelease)>(driver("cuMemRelease"))(handle);
  }
  EXPECT_NEAR(static_cast<double>(device_->AvailableMemory()), static_cast<double>(before),
              8.0 * kMiB);
}

TEST_F(CudaDeviceTest, CopiesRunInOrder) {
  const auto staging = device_->AllocateStaging(kMiB);
  ASSERT_OK(staging);
  EXPECT_EQ(staging->as<unsigned char>()[kMiB - 1], 0);
  const auto memory = device_->Allocate(kMiB);
  ASSERT_OK(memory);
  const auto stream = device_->NewStream();
  std::memset(staging->data(), 7, kMiB);
  stream->CopyToDevice(memory->data(), staging->data(), kMiB);
  stream->CopyToHost(staging->data(), memory->data(), 0);
  const auto back = device_->AllocateStaging(kMiB);
  ASSERT_OK(back);
  stream->CopyToHost(back->data(), memory->data(), kMiB);
  stream->Synchronize();
  EXPECT_EQ(std::memcmp(back->data(), staging->data(), kMiB), 0);
}

TEST_F(CudaDeviceTest, AnEventIsTrueOnceItsWorkIsDone) {
  const auto scratch = device_->Allocate(1024 * kMiB);
  ASSERT_OK(scratch);
  const auto stream = device_->NewStream();
  Busy(stream.get(), *scratch, 1);
  stream->Synchronize();
  const auto event = device_->NewEvent();
  EXPECT_FALSE(event->Ready());
  EXPECT_FALSE(event->WaitFor(absl::Milliseconds(2)));  // nobody has recorded it
  Busy(stream.get(), *scratch, 20);
  stream->Record(event.get());
  EXPECT_FALSE(event->Ready());
  EXPECT_FALSE(event->WaitFor(absl::ZeroDuration()));
  EXPECT_TRUE(event->WaitFor(absl::Seconds(10)));
  EXPECT_TRUE(event->Ready());
  EXPECT_EQ(cudaStreamQuery(static_cast<CudaStream*>(stream.get())->handle()), cudaSuccess);
}

TEST_F(CudaDeviceTest, ThreadsWaitForAnEventThatIsRecordedLater) {
  const auto scratch = device_->Allocate(256 * kMiB);
  ASSERT_OK(scratch);
  const auto stream = device_->NewStream();
  for (int round = 0; round < 20; ++round) {
    const auto event = device_->NewEvent();
    std::vector<std::thread> waiting;
    std::atomic<int> seen{0};
    for (int i = 0; i < 4; ++i) {
      waiting.emplace_back([&] { seen += event->WaitFor(absl::Seconds(10)) ? 1 : 0; });
    }
    Busy(stream.get(), *scratch, 3);
    stream->Record(event.get());
    for (std::thread& thread : waiting) thread.join();
    EXPECT_EQ(seen, 4);
  }
}

// An event that was given back and taken again knows nothing of its earlier life.
TEST_F(CudaDeviceTest, EventsAreUsedAgain) {
  const auto scratch = device_->Allocate(1024 * kMiB);
  ASSERT_OK(scratch);
  const auto stream = device_->NewStream();
  for (int round = 0; round < 3; ++round) {
    const auto event = device_->NewEvent();
    EXPECT_FALSE(event->Ready());
    Busy(stream.get(), *scratch, 10);
    stream->Record(event.get());
    EXPECT_FALSE(event->Ready());
    EXPECT_TRUE(event->WaitFor(absl::Seconds(10)));
  }
}

// How long after its work an event is seen to be true, by a wait of about a decode step and by a
// short one: the median of the excess over cudaEventSynchronize's spin.
TEST_F(CudaDeviceTest, WaitingIsQuick) {
  const auto scratch = device_->Allocate(1024 * kMiB);
  ASSERT_OK(scratch);
  const auto stream = device_->NewStream();
  const auto median = [&](int copies, bool spin) {
    std::vector<double> times;
    for (int round = 0; round < 15; ++round) {
      const auto event = device_->NewEvent();
      const absl::Time begin = absl::Now();
      Busy(stream.get(), *scratch, copies);
      stream->Record(event.get());
      if (spin) {
        while (!event->Ready()) {
        }
      } else {
        EXPECT_TRUE(event->WaitFor(absl::Seconds(10)));
      }
      times.push_back(absl::ToDoubleMicroseconds(absl::Now() - begin));
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  };
  for (const int copies : {0, 1, 20}) {
    const double spun = median(copies, true), waited = median(copies, false);
    std::printf("%d copies: %.1f us spinning, %.1f us waiting\n", copies, spun, waited);
    EXPECT_LT(waited, spun + 100);  // a busy machine may add some
  }
}

TEST_F(CudaDeviceTest, EventsAndBuffersMayEndOnOtherThreads) {
  auto memory = device_->Allocate(kMiB);
  ASSERT_OK(memory);
  auto event = device_->NewEvent();
  std::thread([m = *std::move(memory), e = std::move(event)]() mutable {
    m = Buffer();
    e.reset();
  }).join();
  EXPECT_OK(device_->Allocate(kMiB));
}

TEST_F(CudaDeviceTest, TheInjectedFaultEndsTheProcessAtItsStep) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        setenv("TANDEM_CUDA_FAULT_STEP", "3", 1);
        const auto device = CudaDevice::Open(0);
        const auto stream = (*device)->NewStream();
        for (int step = 1; step < 10; ++step) stream->BeginStep(step);
      },
      ::testing::ExitedWithCode(kCudaErrorExit), "TANDEM_CUDA_FAULT_STEP: injected fault.*step 3");
}

}  // namespace
}  // namespace tandem::engine::cuda

#include "cli/doctor_text.h"

#include <limits>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/unit/cli/widest_line.h"

namespace tandem::cli {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

void AddWorker(v1::GetClusterResponse* cluster, const std::string& id, const std::string& role) {
  v1::Worker* worker = cluster->add_workers();
  worker->set_worker_id(id);
  worker->set_role(role);
}

// Two prefill workers and a decode worker, of which one pair is linked.
v1::GetClusterResponse LinkedCluster() {
  v1::GetClusterResponse cluster;
  AddWorker(&cluster, "decode-0", "decode");
  AddWorker(&cluster, "prefill-0", "prefill");
  AddWorker(&cluster, "prefill-1", "prefill");
  v1::Link* link = cluster.add_links();
  link->set_src("prefill-0");
  link->set_dst("decode-0");
  link->set_transport("tcp");
  link->set_bytes_per_second(0.9e9);
  link->set_small_bytes_per_second(0.41e9);
  link->set_medium_bytes_per_second(1.02e9);
  link->set_large_bytes_per_second(1.115e9);
  link->set_large_bytes(uint64_t{48} << 20);
  link->set_latency_seconds(38e-6);
  link->set_state("ok");
  link->set_note("shm: the peer is on another host");
  return cluster;
}

TEST(DoctorText, TheMatrixOfLinks) {
  EXPECT_EQ(LinksText(LinkedCluster()),
            "src        dst       transport  64 KB  1 MB         64 MB   now  us  state\n"
            "prefill-0  decode-0  tcp         0.41  1.02  1.11 (48 MB)  0.90  38  ok\n"
            "\n"
            "GB/s by the self-test, now: of recent transfers; us: there and back\n"
            "\n"
            "prefill-0 -> decode-0: shm: the peer is on another host\n"
            "\n"
            "1 of 2 pairs of a prefill and a decode worker have no link yet; one is made by\n"
            "the first request that takes the pair\n");
  EXPECT_TRUE(LinksWork(LinkedCluster()));
}

TEST(DoctorText, ARefusedLinkIsNoWorkingOne) {
  v1::GetClusterResponse cluster = LinkedCluster();
  v1::Link* link = cluster.mutable_links(0);
  link->set_state("refused");
  link->set_transport("");
  link->set_note(std::string("the link from prefill-0 to decode-0 over tcp fails its self-test: ") +
                 "the self-test's pattern came out wrong (65536 bytes, frame 3)");
  for (const auto clear :
       {&v1::Link::clear_bytes_per_second, &v1::Link::clear_latency_seconds,
        &v1::Link::clear_small_bytes_per_second, &v1::Link::clear_medium_bytes_per_second,
        &v1::Link::clear_large_bytes_per_second}) {
    (link->*clear)();
  }
  EXPECT_FALSE(LinksWork(cluster));
  const std::string text = LinksText(cluster);
  EXPECT_THAT(text, AllOf(HasSubstr("refused"), HasSubstr("none"), HasSubstr("pattern came out")));
  EXPECT_LE(WidestLine(text), kDoctorWidth);
}

TEST(DoctorText, FitsTheTerminalWhateverTheNamesAre) {
  v1::GetClusterResponse cluster = LinkedCluster();
  cluster.mutable_links(0)->set_src("prefill-worker-17");
  cluster.mutable_links(0)->set_dst("decode-worker-17");
  EXPECT_LE(WidestLine(LinksText(cluster)), kDoctorWidth);
}

TEST(DoctorText, AClusterWithoutLinksSaysWhyThereAreNone) {
  v1::GetClusterResponse cluster;
  AddWorker(&cluster, "unified-0", "unified");
  EXPECT_EQ(LinksText(cluster), "no worker ships KV blocks to another\n");
  AddWorker(&cluster, "p", "prefill");
  AddWorker(&cluster, "d", "decode");
  EXPECT_THAT(LinksText(cluster), HasSubstr("1 of 1 pairs"));
  EXPECT_EQ(LinksJson(cluster)["pairs_without_link"], 1);
}

HostFacts Host() {
  HostFacts facts;
  facts.cpu = "Some CPU @ 2.00GHz";
  facts.cores = 32;
  facts.memory_bytes = uint64_t{256} << 30;
  facts.memory_available = uint64_t{200} << 30;
  facts.numa_nodes = 2;
  facts.shm_bytes = uint64_t{128} << 30;
  facts.shm_free = uint64_t{128} << 30;
  facts.locked_bytes = std::numeric_limits<uint64_t>::max();
  facts.open_files = 1 << 20;
  facts.driver_error = "libcuda.so.1 is not there";
  return facts;
}

// Cards 0 and 1 reach each other, 2 reaches nobody.
HostFacts HostWithCards() {
  HostFacts facts = Host();
  facts.cuda_built = true;
  facts.driver = "13.0";
  facts.driver_error = "";
  for (int i = 0; i < 3; ++i) {
    facts.gpus.push_back({"NVIDIA GeForce RTX 4090 D",
                          uint64_t{24} << 30,
                          "0000:c1:00.0",
                          1,
                          true,
                          {i < 2, i < 2, i == 2}});
  }
  return facts;
}

std::string TransportOf(const HostFacts& facts, const std::string& from, const std::string& to) {
  for (const HostPair& pair : PairsOf(facts)) {
    if (pair.from == from && pair.to == to) {
      return pair.transport + (pair.why.empty() ? "" : ": " + pair.why);
    }
  }
  return "none";
}

TEST(DoctorText, SaysWhatEachPairWillUseAndWhyNotBetter) {
  const HostFacts facts = HostWithCards();
  EXPECT_EQ(TransportOf(facts, "host", "host"), "shm");
  EXPECT_EQ(TransportOf(facts, "GPU 0", "GPU 0"), "cuda_ipc");
  EXPECT_EQ(TransportOf(facts, "GPU 0", "GPU 1"), "cuda_ipc");
  EXPECT_EQ(TransportOf(facts, "GPU 0", "GPU 2"), "shm_ring: no peer access");
  HostFacts no_export = facts;
  no_export.gpus[1].exports_memory = false;
  EXPECT_EQ(TransportOf(no_export, "GPU 0", "GPU 1"),
            "shm_ring: GPU 1 cannot share its memory with other processes");
  HostFacts alone = facts;
  alone.sharing_error = "processes cannot be watched (pidfd_open: Function not implemented)";
  EXPECT_EQ(TransportOf(alone, "host", "host"), "tcp: " + alone.sharing_error);
  EXPECT_EQ(TransportOf(alone, "GPU 0", "GPU 0"), "tcp: " + alone.sharing_error);
  // A build that does not compute on cards.
  HostFacts cpu_only = facts;
  cpu_only.cuda_built = false;
  EXPECT_EQ(PairsOf(cpu_only).size(), 1u);
}

TEST(DoctorText, DescribesAHost) {
  EXPECT_EQ(HostText(Host()),
            "CPU         Some CPU @ 2.00GHz, 32 cores, 2 NUMA nodes\n"
            "memory      256 GiB, 200 GiB may be taken\n"
            "/dev/shm    128 GiB, 128 GiB free\n"
            "limits      locked memory no limit, open files 1048576\n"
            "sharing     processes can watch each other and share memory\n"
            "CUDA        none in this build: CPU only; no driver: libcuda.so.1 is not there\n"
            "\n"
            "KV blocks between two workers of this host (--kv-transport=auto):\n"
            "from  to    transport  why no better one\n"
            "host  host  shm\n");
}

TEST(DoctorText, NamesLimitsThatAreLowAndFitsTheTerminal) {
  HostFacts facts = HostWithCards();
  facts.locked_bytes = uint64_t{8} << 20;
  facts.open_files = 1024;
  facts.sharing_error = "Unix sockets of the abstract namespace cannot be had (Permission denied)";
  const std::string text = HostText(facts);
  EXPECT_THAT(text, AllOf(HasSubstr("ulimit -n 65536"), HasSubstr("locked memory: some drivers")));
  EXPECT_LE(WidestLine(text), kDoctorWidth);
  EXPECT_THAT(HostText(HostWithCards()), Not(HasSubstr("ulimit")));
}

TEST(DoctorText, JsonSaysTheSame) {
  const nlohmann::ordered_json host = HostJson(HostWithCards());
  EXPECT_EQ(host["gpus"].size(), 3u);
  EXPECT_EQ(host["pairs"].size(), 10u);
  EXPECT_TRUE(host["locked_bytes"].is_null());
  const nlohmann::ordered_json links = LinksJson(LinkedCluster());
  EXPECT_EQ(links["links"][0]["transport"], "tcp");
  EXPECT_EQ(links["links"][0]["large_bytes"], uint64_t{48} << 20);
  EXPECT_EQ(links["pairs"], 2);
}

// Whatever the machine, it is read without trouble.
TEST(HostFacts, TellsSomethingOfThisMachine) {
  const HostFacts facts = ReadHostFacts();
  EXPECT_GT(facts.cores, 0);
  EXPECT_GT(facts.memory_bytes, 0u);
  EXPECT_EQ(facts.driver.empty(), !facts.driver_error.empty());
  EXPECT_FALSE(PairsOf(facts).empty());
}

}  // namespace
}  // namespace tandem::cli

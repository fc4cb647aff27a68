#include "engine/kernels/cpu/linear_onednn.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <omp.h>
#include <tuple>

#include "oneapi/dnnl/dnnl.hpp"

namespace tandem {
namespace {

using dnnl::memory;

// Rows per call: few sizes, so that few primitives exist whatever the batches are.
constexpr size_t kRowTiles[] = {256, 64, 16};

const dnnl::engine& Cpu() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

// What a primitive is made for: rows, columns, inputs, stride of the result, bias or none.
using Key = std::tuple<size_t, size_t, size_t, size_t, bool>;

std::shared_ptr<const dnnl::matmul> MakeMatmul(const Key& key) {
  const auto [rows, columns, inputs, y_stride, bias] = key;
  const auto dim = [](size_t value) { return static_cast<memory::dim>(value); };
  const memory::desc x({dim(rows), dim(inputs)}, memory::data_type::bf16, memory::format_tag::ab);
  const memory::desc w({dim(inputs), dim(columns)}, memory::data_type::bf16,
                       memory::format_tag::BA16a32b2a);
  const memory::desc y({dim(rows), dim(columns)}, memory::data_type::f32,
                       memory::dims{dim(y_stride), 1});
  const memory::desc b({1, dim(columns)}, memory::data_type::f32, memory::format_tag::ab);
  const dnnl::matmul::desc desc =
      bias ? dnnl::matmul::desc(x, w, b, y) : dnnl::matmul::desc(x, w, y);
  return std::make_shared<const dnnl::matmul>(dnnl::matmul::primitive_desc(desc, Cpu()));
}

// Bounded by the model's few shapes times the row tiles times the threads' column ranges.
std::shared_ptr<const dnnl::matmul> CachedMatmul(const Key& key) {
  static std::mutex mutex;
  static std::map<Key, std::shared_ptr<const dnnl::matmul>>& cache =
      *new std::map<Key, std::shared_ptr<const dnnl::matmul>>;
  {
    const std::lock_guard lock(mutex);
    const auto it = cache.find(key);
    if (it != cache.end()) return it->second;
  }
  std::shared_ptr<const dnnl::matmul> made = MakeMatmul(key);
  const std::lock_guard lock(mutex);
  return cache.emplace(key, std::move(made)).first->second;
}

void RunTile(const LinearArgs& args, const uint16_t* x, size_t padded, size_t first_column,
             size_t columns, size_t row, size_t rows) {
  const std::shared_ptr<const dnnl::matmul> matmul =
      CachedMatmul({rows, columns, padded, args.y_stride, args.bias != nullptr});
  const auto descs = matmul->get_primitive_desc();
  const auto wrap = [&](dnnl::query what, const void* data) {
    return memory(memory::desc(*dnnl_primitive_desc_query_md(descs, dnnl::convert_to_c(what), 0)),
                  Cpu(), const_cast<void*>(data));
  };
  const uint16_t* weights = static_cast<const uint16_t*>(args.w->data) + first_column * padded;
  std::unordered_map<int, memory> arguments = {
      {DNNL_ARG_SRC, wrap(dnnl::query::src_md, x + row * padded)},
      {DNNL_ARG_DST, wrap(dnnl::query::dst_md, args.y + row * args.y_stride + first_column)},
  };
  arguments.emplace(DNNL_ARG_WEIGHTS, wrap(dnnl::query::weights_md, weights));
  if (args.bias != nullptr) {
    const memory::desc bias({1, static_cast<memory::dim>(columns)}, memory::data_type::f32,
                            memory::format_tag::ab);
    arguments.emplace(DNNL_ARG_BIAS,
                      memory(bias, Cpu(), const_cast<float*>(args.bias + first_column)));
  }
  thread_local dnnl::stream stream(Cpu());
  matmul->execute(stream, arguments);
  stream.wait();
}

}  // namespace

bool OneDnnHasAmx() {
  static const bool has = [] {
    try {
      const auto isa = static_cast<unsigned>(dnnl::get_effective_cpu_isa());
      const auto amx = static_cast<unsigned>(dnnl::cpu_isa::avx512_core_amx);
      return (isa & amx) == amx;
    } catch (const dnnl::error&) {
      return false;
    }
  }();
  return has;
}

size_t OneDnnPanels(const LinearArgs& args, const uint16_t* x, size_t padded, size_t panel_begin,
                    size_t panel_end) {
  const size_t first_column = panel_begin * kPanel;
  const size_t columns = std::min(panel_end * kPanel, args.w->n) - first_column;
  // The caller's team already uses every core. The setting is this thread's own.
  omp_set_num_threads(1);
  size_t row = 0;
  try {
    for (const size_t tile : kRowTiles) {
      for (; row + tile <= args.rows; row += tile) {
        RunTile(args, x, padded, first_column, columns, row, tile);
      }
    }
  } catch (const dnnl::error&) {
    // What it cannot do is left to the caller, from the first row that is not written.
  }
  return row;
}

}  // namespace tandem

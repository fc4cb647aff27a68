#include "engine/kernels/cpu/linear_onednn.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
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

// Columns per call: the tile's result stays in the second-level cache until it is copied. oneDNN
// has no fast kernel that writes rows with gaps between them.
constexpr size_t kColumns = 512;

// What a primitive is made for: rows, columns, inputs, bias or none.
using Key = std::tuple<size_t, size_t, size_t, bool>;

// Null where oneDNN has only its reference code for this, a hundred times slower than ours.
std::unique_ptr<const dnnl::matmul> MakeMatmul(const Key& key) {
  const auto [rows, columns, inputs, bias] = key;
  const auto dim = [](size_t value) { return static_cast<memory::dim>(value); };
  const auto dense = memory::format_tag::ab;
  const memory::desc x({dim(rows), dim(inputs)}, memory::data_type::bf16, dense);
  const memory::desc w({dim(inputs), dim(columns)}, memory::data_type::bf16,
                       memory::format_tag::BA16a32b2a);
  const memory::desc y({dim(rows), dim(columns)}, memory::data_type::f32, dense);
  const memory::desc b({1, dim(columns)}, memory::data_type::f32, dense);
  const dnnl::matmul::desc desc =
      bias ? dnnl::matmul::desc(x, w, b, y) : dnnl::matmul::desc(x, w, y);
  const dnnl::matmul::primitive_desc primitive(desc, Cpu());
  if (!std::string_view(primitive.impl_info_str()).starts_with("brg")) return nullptr;
  return std::make_unique<const dnnl::matmul>(primitive);
}

// One cache per thread: a primitive's scratchpad belongs to the thread that made it. Bounded by the
// model's few shapes times the row tiles times whole and last column ranges.
const dnnl::matmul* CachedMatmul(const Key& key) {
  thread_local std::map<Key, std::unique_ptr<const dnnl::matmul>> cache;
  const auto it = cache.find(key);
  if (it != cache.end()) return it->second.get();
  return cache.emplace(key, MakeMatmul(key)).first->second.get();
}

// False, with nothing written, where there is no fast primitive.
bool RunTile(const LinearArgs& args, const uint16_t* x, size_t padded, size_t first_column,
             size_t columns, size_t row, size_t rows) {
  const dnnl::matmul* matmul = CachedMatmul({rows, columns, padded, args.bias != nullptr});
  if (matmul == nullptr) return false;
  const auto wrap = [](size_t d0, size_t d1, memory::data_type type, memory::format_tag tag,
                       const void* data) {
    return memory({{static_cast<memory::dim>(d0), static_cast<memory::dim>(d1)}, type, tag}, Cpu(),
                  const_cast<void*>(data));
  };
  const auto dense = memory::format_tag::ab;
  thread_local std::vector<float> result;
  result.resize(kRowTiles[0] * kColumns);
  const uint16_t* weights = static_cast<const uint16_t*>(args.w->data) + first_column * padded;
  std::unordered_map<int, memory> arguments = {
      {DNNL_ARG_SRC, wrap(rows, padded, memory::data_type::bf16, dense, x + row * padded)},
      {DNNL_ARG_WEIGHTS,
       wrap(padded, columns, memory::data_type::bf16, memory::format_tag::BA16a32b2a, weights)},
      {DNNL_ARG_DST, wrap(rows, columns, memory::data_type::f32, dense, result.data())},
  };
  if (args.bias != nullptr) {
    arguments.emplace(DNNL_ARG_BIAS,
                      wrap(1, columns, memory::data_type::f32, dense, args.bias + first_column));
  }
  thread_local dnnl::stream stream(Cpu());
  matmul->execute(stream, arguments);
  stream.wait();
  for (size_t r = 0; r < rows; ++r) {
    std::memcpy(args.y + (row + r) * args.y_stride + first_column, result.data() + r * columns,
                columns * sizeof(float));
  }
  return true;
}

// All the columns of some rows.
bool RunRows(const LinearArgs& args, const uint16_t* x, size_t padded, size_t first_column,
             size_t end_column, size_t row, size_t rows) {
  for (size_t c = first_column; c < end_column; c += kColumns) {
    const size_t columns = std::min(kColumns, end_column - c);
    if (!RunTile(args, x, padded, c, columns, row, rows)) return false;
  }
  return true;
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
  const size_t end_column = std::min(panel_end * kPanel, args.w->n);
  // The caller's team already uses every core. The setting is this thread's own.
  omp_set_num_threads(1);
  size_t row = 0;
  try {
    for (const size_t tile : kRowTiles) {
      for (; row + tile <= args.rows; row += tile) {
        if (!RunRows(args, x, padded, first_column, end_column, row, tile)) return row;
      }
    }
  } catch (const dnnl::error&) {
    // What it cannot do is left to the caller, from the first row that is not written.
  }
  return row;
}

}  // namespace tandem

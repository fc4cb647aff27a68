// The bfloat16 matrix product of linear.h on AMX tiles: TDPBF16PS multiplies 16 rows of 32 inputs
// by 32 inputs of 16 columns. Of the eight tile registers four hold sums (two row tiles by two
// column tiles, the columns of one panel), two hold inputs and two hold weights.
//
// Order of summation of an output element: it starts at the bias; each 32 inputs add the sum of
// their products at even places plus the sum of those at odd places. A tile's rows do not meet, so
// neither the rows in a tile nor the tiles in a batch change a row's result.
//
// Rounded inputs lie tile by tile, [row tile][K / 32][16][32]: each tile is one run of 1 KiB.
#include <algorithm>

#include "common/base/cpu_features.h"
#include "engine/kernels/cpu/linear_internal.h"

#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TANDEM_AMX \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")))

namespace tandem::engine {
namespace {

constexpr size_t kTileRows = 16;
constexpr size_t kTileColumns = 16;
constexpr size_t kChunk = 32;  // inputs of one tile
static_assert(kChunk == kKPadding && 2 * kTileColumns == kPanel);
constexpr size_t kInputTile = kTileRows * kChunk;       // elements
constexpr size_t kWeightChunk = kChunk * kPanel;        // elements of a panel per chunk
constexpr size_t kWeightStride = 2 * kPanel * 2;        // bytes from one pair of inputs to the next
constexpr size_t kPrefetchElements = 4 * kWeightChunk;  // 8 KiB ahead

// Inputs that are used by all panels before the next are: they stay in the second-level cache.
constexpr size_t kCachedBytes = size_t{1} << 20;
constexpr size_t kRowBlock = 512;
constexpr size_t kMinDepth = 1024;

// The operand of LDTILECFG.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void Set(int tile, size_t tile_rows, size_t bytes) {
    if (tile_rows == 0 || bytes == 0) return;  // stays unconfigured and unused
    rows[tile] = static_cast<uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};

// Rows and columns of the two by two tiles of sums. Tiles at an edge are configured to what is
// there, so nothing beyond the edge is read or written.
struct TileShape {
  size_t rows[2];
  size_t columns[2];
  bool operator==(const TileShape&) const = default;
};

TANDEM_AMX void Configure(const TileShape& shape) {
  TileConfig config;
  for (int r = 0; r < 2; ++r) {
    for (int c = 0; c < 2; ++c) config.Set(2 * r + c, shape.rows[r], shape.columns[c] * 4);
    config.Set(4 + r, shape.rows[r], kChunk * 2);
    config.Set(6 + r, kChunk / 2, shape.columns[r] * 4);
  }
  // GCC's intrinsic does not tell the compiler that all 64 bytes are read.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

struct TileArgs {
  const uint16_t* x;    // first chunk of the first row tile
  size_t x_tile;        // elements from a row tile to the next
  const uint16_t* w;    // first chunk of the panel
  size_t chunks;        // to add
  const float* start;   // the sums' first values, rows at start_stride bytes; null: zero
  size_t start_stride;  // 0: all rows start with the same values
  float* y;
  size_t y_stride;  // bytes
};

template <typename T>
T* AddBytes(T* p, size_t bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(p) + bytes);
}

template <bool kTwoRows, bool kTwoColumns>
TANDEM_AMX void LoadSums(const float* from, size_t stride) {
  _tile_loadd(0, from, stride);
  if constexpr (kTwoColumns) _tile_loadd(1, from + kTileColumns, stride);
  if constexpr (kTwoRows) {
    const float* second = AddBytes(from, kTileRows * stride);
    _tile_loadd(2, second, stride);
    if constexpr (kTwoColumns) _tile_loadd(3, second + kTileColumns, stride);
  }
}

template <bool kTwoRows, bool kTwoColumns>
TANDEM_AMX void StoreSums(float* to, size_t stride) {
  _tile_stored(0, to, stride);
  if constexpr (kTwoColumns) _tile_stored(1, to + kTileColumns, stride);
  if constexpr (kTwoRows) {
    float* second = AddBytes(to, kTileRows * stride);
    _tile_stored(2, second, stride);
    if constexpr (kTwoColumns) _tile_stored(3, second + kTileColumns, stride);
  }
}

// kPrefetch: the panel comes from memory now; the hardware's prefetcher stops at page ends.
template <bool kTwoRows, bool kTwoColumns, bool kPrefetch>
TANDEM_AMX void MultiplyTiles(const TileArgs& args) {
  if (args.start != nullptr) {
    LoadSums<kTwoRows, kTwoColumns>(args.start, args.start_stride);
  } else {
    _tile_zero(0);
    if constexpr (kTwoColumns) _tile_zero(1);
    if constexpr (kTwoRows) _tile_zero(2);
    if constexpr (kTwoRows && kTwoColumns) _tile_zero(3);
  }
  const uint16_t* x = args.x;
  const uint16_t* w = args.w;
  for (size_t i = 0; i < args.chunks; ++i, x += kInputTile, w += kWeightChunk) {
    _tile_loadd(6, w, kWeightStride);
    _tile_loadd(4, x, kChunk * 2);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwoColumns) {
      _tile_loadd(7, w + 2 * kTileColumns, kWeightStride);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTwoRows) {
      _tile_loadd(5, x + args.x_tile, kChunk * 2);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kTwoColumns) _tile_dpbf16ps(3, 5, 7);
    }
    if constexpr (kPrefetch) {
      for (size_t e = 0; e < kWeightChunk; e += 32) {
        _mm_prefetch(w + kPrefetchElements + e, _MM_HINT_T0);
      }
    }
  }
  StoreSums<kTwoRows, kTwoColumns>(args.y, args.y_stride);
}

using TileFunction = void (*)(const TileArgs&);
constexpr TileFunction kTileFunctions[2][2][2] = {
    // [two rows][two columns][prefetch]
    {{MultiplyTiles<false, false, false>, MultiplyTiles<false, false, true>},
     {MultiplyTiles<false, true, false>, MultiplyTiles<false, true, true>}},
    {{MultiplyTiles<true, false, false>, MultiplyTiles<true, false, true>},
     {MultiplyTiles<true, true, false>, MultiplyTiles<true, true, true>}},
};

// The product for rows [row_begin, row_end) and inputs of chunks [chunk_begin, chunk_end).
struct Block {
  size_t row_begin, row_end;
  size_t chunk_begin, chunk_end;
};

// One panel of a block. Two row tiles at a time: the first two bring the panel into the caches.
TANDEM_AMX void PanelOfBlock(const LinearArgs& args, const uint16_t* inputs, const Block& block,
                             size_t panel, TileShape* configured) {
  const size_t chunks = PaddedInputs(args.w->k) / kChunk;
  const size_t column = panel * kPanel, columns = std::min(kPanel, args.w->n - column);
  TileArgs tile;
  tile.x_tile = chunks * kInputTile;
  tile.w = static_cast<const uint16_t*>(args.w->data) +
           (panel * chunks + block.chunk_begin) * kWeightChunk;
  tile.chunks = block.chunk_end - block.chunk_begin;
  tile.y_stride = args.y_stride * sizeof(float);
  for (size_t r = block.row_begin; r < block.row_end; r += 2 * kTileRows) {
    const size_t rows = std::min(2 * kTileRows, block.row_end - r);
    const TileShape shape = {
        {std::min(rows, kTileRows), rows - std::min(rows, kTileRows)},
        {std::min(columns, kTileColumns), columns - std::min(columns, kTileColumns)}};
    if (shape != *configured) Configure(shape);
    *configured = shape;
    tile.x = inputs + r / kTileRows * tile.x_tile + block.chunk_begin * kInputTile;
    tile.y = args.y + r * args.y_stride + column;
    tile.start = tile.y;
    tile.start_stride = tile.y_stride;
    if (block.chunk_begin == 0) {
      tile.start = args.bias == nullptr ? nullptr : args.bias + column;
      tile.start_stride = 0;
    }
    kTileFunctions[shape.rows[1] > 0][shape.columns[1] > 0][r == block.row_begin](tile);
  }
}

TANDEM_AMX void AmxPanels(const LinearArgs& args, const void* inputs, size_t panel_begin,
                          size_t panel_end) {
  const size_t chunks = PaddedInputs(args.w->k) / kChunk;
  TileShape configured = {};
  for (size_t r = 0; r < args.rows; r += kRowBlock) {
    const size_t rows = std::min(kRowBlock, args.rows - r);
    const size_t depth = std::max(kMinDepth, kCachedBytes / (rows * sizeof(uint16_t))) / kChunk;
    for (size_t c = 0; c < chunks; c += depth) {
      const Block block{r, r + rows, c, std::min(chunks, c + depth)};
      for (size_t p = panel_begin; p < panel_end; ++p) {
        PanelOfBlock(args, static_cast<const uint16_t*>(inputs), block, p, &configured);
      }
    }
  }
  _tile_release();
}

TANDEM_AMX void RoundRows(const LinearArgs& args, size_t begin, size_t end, void* inputs) {
  const size_t k = args.w->k, chunks = PaddedInputs(k) / kChunk;
  for (size_t r = begin; r < end; ++r) {
    const float* x = args.x + r * args.x_stride;
    uint16_t* out = static_cast<uint16_t*>(inputs) + r / kTileRows * chunks * kInputTile +
                    r % kTileRows * kChunk;
    for (size_t i = 0; i < k; i += kChunk, out += kInputTile) {
      const size_t left = std::min(kChunk, k - i);
      const auto mask = static_cast<__mmask32>(left == kChunk ? ~0u : (1u << left) - 1);
      const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), x + i);
      const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), x + i + 16);
      _mm512_storeu_si512(out, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    }
  }
}

// Linux gives the tile registers only to processes that ask for them; the answer holds for all
// threads of the process.
bool AllowedTiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool CpuHasAmx() {
  constexpr unsigned kAmxBF16 = 1u << 22, kAmxTile = 1u << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  return (d & kAmxBF16) != 0 && (d & kAmxTile) != 0 && CpuHasBF16() && AllowedTiles();
}

}  // namespace

const BF16Kernel* AmxBF16Kernel() {
  static constexpr BF16Kernel kKernel = {RoundRows, AmxPanels};
  static const bool has = CpuHasAmx();
  return has ? &kKernel : nullptr;
}

}  // namespace tandem::engine

#else

namespace tandem::engine {

const BF16Kernel* AmxBF16Kernel() { return nullptr; }

}  // namespace tandem::engine

#endif

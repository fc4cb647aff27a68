#include "engine/kernels/cpu/attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "engine/kernels/cpu/attention_unit.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "engine/kernels/cpu/attention.cc"
#include "hwy/aligned_allocator.h"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// Must follow foreach_target.h.
#include "hwy/contrib/math/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tandem::engine {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, kTile>;
using V = hn::Vec<D>;

// Rows handled together, so that enough independent sums hide the latency of multiply-add: a tile
// of 16 positions is one, two or four vectors.
#if HWY_TARGET == HWY_AVX3
constexpr size_t kRowGroup = 8;
constexpr size_t kTileVectors = 1;
#elif HWY_TARGET == HWY_AVX2
constexpr size_t kRowGroup = 4;
constexpr size_t kTileVectors = 2;
#else
constexpr size_t kRowGroup = 2;
constexpr size_t kTileVectors = 4;
#endif

// scores[r][j] = sum_d q[r][d] * keys[d][j], in order of d.
template <size_t kRows>
HWY_INLINE void Scores(const float* const* q, const float* keys, size_t head_dim, float* scores) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  V sums[kRows][kTileVectors];
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t t = 0; t < kTileVectors; ++t) sums[r][t] = hn::Zero(d);
  }
  for (size_t i = 0; i < head_dim; ++i) {
    for (size_t t = 0; t < kTileVectors; ++t) {
      const V key = hn::Load(d, keys + i * kTile + t * lanes);
      for (size_t r = 0; r < kRows; ++r) {
        sums[r][t] = hn::MulAdd(hn::Set(d, q[r][i]), key, sums[r][t]);
      }
    }
  }
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t t = 0; t < kTileVectors; ++t) {
      hn::Store(sums[r][t], d, scores + r * kTile + t * lanes);
    }
  }
}

// Turns a row's scores into weights relative to its new running maximum. `visible` positions of the
// tile are not after the query. Returns the factor that older sums must be multiplied by.
HWY_INLINE float UpdateSoftmax(float* scores, float scale, size_t visible, float* maximum,
                               float* weight_sums) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  const V factor = hn::Set(d, scale), hidden = hn::Set(d, kNoScore);
  V highest = hn::Set(d, *maximum);
  for (size_t t = 0; t < kTileVectors; ++t) {
    const size_t first = t * lanes;
    const auto seen = hn::FirstN(d, visible > first ? visible - first : 0);
    const V s = hn::IfThenElse(seen, hn::Mul(hn::Load(d, scores + first), factor), hidden);
    hn::Store(s, d, scores + first);
    highest = hn::Max(highest, s);
  }
  const V new_maximum = hn::MaxOfLanes(d, highest);
  const V correction = hn::Exp(d, hn::Sub(hn::Set(d, *maximum), new_maximum));
  *maximum = hn::GetLane(new_maximum);
  for (size_t t = 0; t < kTileVectors; ++t) {
    const size_t first = t * lanes;
    const auto seen = hn::FirstN(d, visible > first ? visible - first : 0);
    const V difference = hn::Sub(hn::Load(d, scores + first), new_maximum);
    const V weight = hn::IfThenElseZero(seen, hn::Exp(d, difference));
    hn::Store(weight, d, scores + first);
    hn::Store(hn::MulAdd(hn::Load(d, weight_sums + first), correction, weight), d,
              weight_sums + first);
  }
  return hn::GetLane(correction);
}

// out[r][:] = out[r][:] * correction[r] + sum_j weights[r][j] * values[j][:], in order of j, for
// kVectors vectors of columns.
template <size_t kRows, size_t kVectors>
HWY_INLINE void AddValues(const float* weights, const float* correction, const float* values,
                          size_t value_stride, size_t positions, float* out, size_t out_stride) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  V sums[kRows][kVectors];
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t t = 0; t < kVectors; ++t) {
      sums[r][t] =
          hn::Mul(hn::Load(d, out + r * out_stride + t * lanes), hn::Set(d, correction[r]));
    }
  }
  for (size_t j = 0; j < positions; ++j) {
    for (size_t t = 0; t < kVectors; ++t) {
      const V value = hn::LoadU(d, values + j * value_stride + t * lanes);
      for (size_t r = 0; r < kRows; ++r) {
        sums[r][t] = hn::MulAdd(hn::Set(d, weights[r * kTile + j]), value, sums[r][t]);
      }
    }
  }
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t t = 0; t < kVectors; ++t) {
      hn::Store(sums[r][t], d, out + r * out_stride + t * lanes);
    }
  }
}

template <size_t kRows>
void GroupOfRows(const AttentionUnit& unit, const AttentionTile& tile, size_t row) {
  const AttentionScratch& s = unit.scratch;
  float correction[kRows];
  float* scores = s.scores;
  Scores<kRows>(unit.q_rows + row, tile.keys, unit.head_dim, scores);
  for (size_t r = 0; r < kRows; ++r) {
    const size_t position = unit.start + (row + r) / unit.group;
    const size_t visible = std::min<size_t>(kTile, position + 1 - tile.first_position);
    correction[r] = UpdateSoftmax(scores + r * kTile, unit.scale, visible, s.maximum + row + r,
                                  s.weight_sums + (row + r) * kTile);
  }
  const size_t lanes = hn::Lanes(D());
  const size_t width = unit.padded_dim;
  float* out = s.out + row * width;
  size_t c = 0;
  for (; c + 2 * lanes <= width; c += 2 * lanes) {
    AddValues<kRows, 2>(scores, correction, tile.values + c, tile.value_stride, tile.positions,
                        out + c, width);
  }
  for (; c < width; c += lanes) {
    AddValues<kRows, 1>(scores, correction, tile.values + c, tile.value_stride, tile.positions,
                        out + c, width);
  }
}

// GroupOfRows<count> for count in [1, kRows].
template <size_t kRows>
void UpToRows(size_t count, const AttentionUnit& unit, const AttentionTile& tile, size_t row) {
  if constexpr (kRows > 1) {
    if (count < kRows) return UpToRows<kRows - 1>(count, unit, tile, row);
  }
  GroupOfRows<kRows>(unit, tile, row);
}

// One tile of keys and values for the rows [first_row, rows) of a unit.
void AttendTile(const AttentionUnit& unit, const AttentionTile& tile, size_t first_row) {
  for (size_t row = first_row; row < unit.rows; row += kRowGroup) {
    UpToRows<kRowGroup>(std::min(kRowGroup, unit.rows - row), unit, tile, row);
  }
}

// Where the positions of vector `t` of a tile begin, each `stride` behind the one before. Places
// beyond the last position repeat it: no query sees them.
HWY_INLINE hn::Vec<hn::RebindToSigned<D>> PlacesOf(size_t t, size_t positions, size_t stride) {
  const hn::RebindToSigned<D> di;
  const auto place = hn::Min(hn::Iota(di, static_cast<int32_t>(t * hn::Lanes(di))),
                             hn::Set(di, static_cast<int32_t>(positions) - 1));
  return hn::Mul(place, hn::Set(di, static_cast<int32_t>(stride)));
}

// keys[d][j] of the tile's positions; `source`: its first position, at head_dim elements each.
void LoadFloatKeys(const float* source, size_t positions, size_t head_dim, float* keys) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  for (size_t t = 0; t < kTileVectors; ++t) {
    const auto index = PlacesOf(t, positions, head_dim);
    for (size_t i = 0; i < head_dim; ++i) {
      hn::Store(hn::GatherIndex(d, source + i, index), d, keys + i * kTile + t * lanes);
    }
  }
}

// The same from bfloat16, two elements of each key at a time; head_dim is even.
void LoadBF16Keys(const uint16_t* source, size_t positions, size_t head_dim, float* keys) {
  const D d;
  const hn::RebindToSigned<D> di;
  const hn::RebindToUnsigned<D> du;
  const size_t lanes = hn::Lanes(d);
  const int32_t* pairs = reinterpret_cast<const int32_t*>(source);
  for (size_t t = 0; t < kTileVectors; ++t) {
    const auto index = PlacesOf(t, positions, head_dim / 2);
    float* out = keys + t * lanes;
    for (size_t i = 0; i < head_dim; i += 2) {
      const auto pair = hn::BitCast(du, hn::GatherIndex(di, pairs + i / 2, index));
      hn::Store(hn::BitCast(d, hn::ShiftLeft<16>(pair)), d, out + i * kTile);
      hn::Store(hn::BitCast(d, hn::And(pair, hn::Set(du, 0xffff0000u))), d, out + (i + 1) * kTile);
    }
  }
}

// Rows of padded_dim float32 from rows of head_dim bfloat16, zero beyond head_dim.
void LoadBF16Values(const uint16_t* source, size_t positions, size_t head_dim, size_t padded_dim,
                    float* values) {
  const D d;
  const hn::RebindToUnsigned<D> du;
  const hn::Rebind<uint16_t, D> dh;
  const size_t lanes = hn::Lanes(d);
  for (size_t j = 0; j < positions; ++j, source += head_dim, values += padded_dim) {
    size_t i = 0;
    for (; i + lanes <= head_dim; i += lanes) {
      const auto wide = hn::ShiftLeft<16>(hn::PromoteTo(du, hn::LoadU(dh, source + i)));
      hn::Store(hn::BitCast(d, wide), d, values + i);
    }
    for (; i < padded_dim; ++i) values[i] = i < head_dim ? BF16ToFloat(source[i]) : 0.0f;
  }
}

// E4M3ToFloat() of each lane. Without subnormal floats, which are slow on some processors.
HWY_INLINE V FromE4M3(hn::Vec<hn::RebindToUnsigned<D>> codes) {
  const D d;
  const hn::RebindToSigned<D> di;
  const hn::RebindToUnsigned<D> du;
  const auto magnitude = hn::And(codes, hn::Set(du, 0x7fu));
  const auto sign = hn::ShiftLeft<24>(hn::Xor(codes, magnitude));
  const V small = hn::Mul(hn::ConvertTo(d, hn::BitCast(di, magnitude)), hn::Set(d, 0x1p-9f));
  const auto large = hn::Add(hn::ShiftLeft<20>(magnitude), hn::Set(du, 120u << 23));
  auto value = hn::IfThenElse(hn::Lt(magnitude, hn::Set(du, 8u)), hn::BitCast(du, small), large);
  value = hn::IfThenElse(hn::Eq(magnitude, hn::Set(du, 0x7fu)), hn::Set(du, 0x7fc00000u), value);
  return hn::BitCast(d, hn::Or(value, sign));
}

// The same keys from e4m3, four elements of each at a time where the head has whole fours.
void LoadE4M3Keys(const uint8_t* source, size_t positions, size_t head_dim, float* keys) {
  if (head_dim % 4 != 0) {
    for (size_t j = 0; j < kTile; ++j) {
      const uint8_t* key = source + std::min(j, positions - 1) * head_dim;
      for (size_t i = 0; i < head_dim; ++i) keys[i * kTile + j] = E4M3ToFloat(key[i]);
    }
    return;
  }
  const D d;
  const hn::RebindToSigned<D> di;
  const hn::RebindToUnsigned<D> du;
  const size_t lanes = hn::Lanes(d);
  const auto byte = hn::Set(du, 0xffu);
  const int32_t* fours = reinterpret_cast<const int32_t*>(source);
  for (size_t t = 0; t < kTileVectors; ++t) {
    const auto index = PlacesOf(t, positions, head_dim / 4);
    float* out = keys + t * lanes;
    for (size_t i = 0; i < head_dim; i += 4) {
      const auto four = hn::BitCast(du, hn::GatherIndex(di, fours + i / 4, index));
      hn::Store(FromE4M3(hn::And(four, byte)), d, out + i * kTile);
      hn::Store(FromE4M3(hn::And(hn::ShiftRight<8>(four), byte)), d, out + (i + 1) * kTile);
      hn::Store(FromE4M3(hn::And(hn::ShiftRight<16>(four), byte)), d, out + (i + 2) * kTile);
      hn::Store(FromE4M3(hn::ShiftRight<24>(four)), d, out + (i + 3) * kTile);
    }
  }
}

// Rows of padded_dim float32 from rows of head_dim e4m3, zero beyond head_dim.
void LoadE4M3Values(const uint8_t* source, size_t positions, size_t head_dim, size_t padded_dim,
                    float* values) {
  const D d;
  const hn::RebindToUnsigned<D> du;
  const hn::Rebind<uint8_t, D> db;
  const size_t lanes = hn::Lanes(d);
  for (size_t j = 0; j < positions; ++j, source += head_dim, values += padded_dim) {
    size_t i = 0;
    for (; i + lanes <= head_dim; i += lanes) {
      hn::Store(FromE4M3(hn::PromoteTo(du, hn::LoadU(db, source + i))), d, values + i);
    }
    for (; i < padded_dim; ++i) values[i] = i < head_dim ? E4M3ToFloat(source[i]) : 0.0f;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace tandem::engine
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tandem::engine {
namespace {

HWY_EXPORT(AttendTile);
HWY_EXPORT(LoadFloatKeys);
HWY_EXPORT(LoadBF16Keys);
HWY_EXPORT(LoadBF16Values);
HWY_EXPORT(LoadE4M3Keys);
HWY_EXPORT(LoadE4M3Values);

// Rows (query, head) of one unit of work: they share a pass over the keys and values.
constexpr size_t kUnitRows = 64;

size_t RoundUpToTile(size_t value) { return (value + kTile - 1) / kTile * kTile; }

// Memory of one thread, kept for its lifetime; grows to the largest model it has served.
float* ThreadScratch(size_t floats) {
  thread_local hwy::AlignedFreeUniquePtr<float[]> memory;
  thread_local size_t size = 0;
  if (size < floats) {
    memory = hwy::AllocateAligned<float>(floats);
    size = floats;
  }
  return memory.get();
}

// Points tile->keys at a transposed copy of positions [first, first + tile->positions) of the page.
void LoadKeys(const std::byte* page, Element element, size_t first, const AttentionUnit& unit,
              AttentionTile* tile) {
  const size_t dim = unit.head_dim;
  float* keys = unit.scratch.keys;
  tile->keys = keys;
  if (element == Element::kFloat32) {
    const float* source = reinterpret_cast<const float*>(page) + first * dim;
    HWY_DYNAMIC_DISPATCH(LoadFloatKeys)(source, tile->positions, dim, keys);
  } else if (element == Element::kBFloat16) {
    const uint16_t* source = reinterpret_cast<const uint16_t*>(page) + first * dim;
    HWY_DYNAMIC_DISPATCH(LoadBF16Keys)(source, tile->positions, dim, keys);
  } else {
    const uint8_t* source = reinterpret_cast<const uint8_t*>(page) + first * dim;
    HWY_DYNAMIC_DISPATCH(LoadE4M3Keys)(source, tile->positions, dim, keys);
  }
}

// Points tile->values at the page itself, or at a float32 copy with padded rows.
void LoadValues(const std::byte* page, Element element, size_t first, const AttentionUnit& unit,
                AttentionTile* tile) {
  const size_t dim = unit.head_dim;
  if (element == Element::kFloat32 && dim == unit.padded_dim) {
    tile->values = reinterpret_cast<const float*>(page) + first * dim;
    tile->value_stride = dim;
    return;
  }
  float* copy = unit.scratch.values;
  tile->values = copy;
  tile->value_stride = unit.padded_dim;
  if (element == Element::kBFloat16) {
    const uint16_t* source = reinterpret_cast<const uint16_t*>(page) + first * dim;
    HWY_DYNAMIC_DISPATCH(LoadBF16Values)(source, tile->positions, dim, unit.padded_dim, copy);
    return;
  }
  if (element == Element::kFloat8E4M3) {
    const uint8_t* source = reinterpret_cast<const uint8_t*>(page) + first * dim;
    HWY_DYNAMIC_DISPATCH(LoadE4M3Values)(source, tile->positions, dim, unit.padded_dim, copy);
    return;
  }
  const float* source = reinterpret_cast<const float*>(page) + first * dim;
  for (size_t j = 0; j < tile->positions; ++j) {
    std::memcpy(copy + j * unit.padded_dim, source + j * dim, dim * sizeof(float));
    std::fill(copy + j * unit.padded_dim + dim, copy + (j + 1) * unit.padded_dim, 0.0f);
  }
}

AttentionScratch CarveScratch(size_t rows, size_t head_dim, size_t padded_dim) {
  AttentionScratch s;
  const size_t keys = head_dim * kTile, values = kTile * padded_dim;
  const size_t padded_rows = RoundUpToTile(rows);
  float* at =
      ThreadScratch(keys + values + padded_rows * (padded_dim + kTile + 1) + kUnitRows * kTile);
  s.keys = at;
  s.values = s.keys + keys;
  s.out = s.values + values;
  s.weight_sums = s.out + padded_rows * padded_dim;
  s.maximum = s.weight_sums + padded_rows * kTile;
  s.scores = s.maximum + padded_rows;
  std::fill_n(s.out, rows * padded_dim, 0.0f);
  std::fill_n(s.weight_sums, rows * kTile, 0.0f);
  std::fill_n(s.maximum, rows, kNoScore);
  return s;
}

// Keys or values of the tile at position `first`: a decode step reads them once, from memory, in
// pieces too short for the processor to foresee the next. Inlined by force: GCC takes a function
// that only prefetches for one without effect, and drops its calls.
HWY_INLINE void PrefetchTile(const KvPages& pages, const int32_t* block_table, size_t first,
                             bool value, int kv_head) {
  const size_t block_size = static_cast<size_t>(pages.block_size);
  const size_t row_bytes = static_cast<size_t>(pages.head_dim) * ElementSize(pages.element);
  const size_t offset = first % block_size, positions = std::min(kTile, block_size - offset);
  const std::byte* page = pages.Page(block_table[first / block_size], value, kv_head);
  const std::byte* end = page + (offset + positions) * row_bytes;
  for (const std::byte* at = page + offset * row_bytes; at < end; at += 64) __builtin_prefetch(at);
}

void RunUnit(const KvPages& pages, const AttentionItem& item, int kv_head, AttentionUnit* unit) {
  const size_t end = unit->start + unit->rows / unit->group;  // positions seen by the last query
  const size_t block_size = static_cast<size_t>(pages.block_size);
  for (size_t first = 0; first < end; first += kTile) {
    const int32_t block = item.block_table[first / block_size];
    const size_t offset = first % block_size;
    const size_t next = first + kTile;
    if (next < end) PrefetchTile(pages, item.block_table, next, false, kv_head);
    AttentionTile tile;
    tile.first_position = first;
    tile.positions = std::min(kTile, end - first);
    LoadKeys(pages.Page(block, false, kv_head), pages.element, offset, *unit, &tile);
    LoadValues(pages.Page(block, true, kv_head), pages.element, offset, *unit, &tile);
    if (next < end) PrefetchTile(pages, item.block_table, next, true, kv_head);
    const size_t first_query = first > unit->start ? first - unit->start : 0;
    HWY_DYNAMIC_DISPATCH(AttendTile)(*unit, tile, first_query * unit->group);
  }
}

void WriteResult(const AttentionUnit& unit, float* const* out_rows) {
  for (size_t r = 0; r < unit.rows; ++r) {
    float sum = 0;
    for (size_t j = 0; j < kTile; ++j) sum += unit.scratch.weight_sums[r * kTile + j];
    const float inverse = 1.0f / sum;
    const float* from = unit.scratch.out + r * unit.padded_dim;
    for (size_t i = 0; i < unit.head_dim; ++i) out_rows[r][i] = from[i] * inverse;
  }
}

struct WorkItem {
  const AttentionItem* item;
  int kv_head;
  int first_query;  // within the item
  int queries;
};

std::vector<WorkItem> CutWork(const AttentionItem* items, size_t num_items, int kv_heads,
                              size_t group, size_t* cost) {
  std::vector<WorkItem> work;
  const int queries = static_cast<int>(std::max<size_t>(1, kUnitRows / group));
  *cost = 0;
  for (size_t n = 0; n < num_items; ++n) {
    for (int first = 0; first < items[n].rows; first += queries) {
      for (int head = 0; head < kv_heads; ++head) {
        work.push_back({&items[n], head, first, std::min(queries, items[n].rows - first)});
      }
    }
    *cost += static_cast<size_t>(items[n].rows) *
             static_cast<size_t>(items[n].start + items[n].rows) * group *
             static_cast<size_t>(kv_heads);
  }
  return work;
}

}  // namespace

void PagedAttention(const KvPages& pages, const AttentionItem* items, size_t num_items,
                    const float* q, size_t q_stride, int heads, float scale, float* out,
                    size_t out_stride, Threads* threads) {
  const size_t head_dim = static_cast<size_t>(pages.head_dim);
  const size_t group = static_cast<size_t>(heads / pages.kv_heads);
  size_t cost = 0;  // scores to compute
  const std::vector<WorkItem> work = CutWork(items, num_items, pages.kv_heads, group, &cost);
  threads->ForEach(work.size(), cost * head_dim > 50000, [&](size_t index, int) {
    const WorkItem& w = work[index];
    const size_t rows = static_cast<size_t>(w.queries) * group;
    thread_local std::vector<const float*> q_rows;
    thread_local std::vector<float*> out_rows;
    q_rows.resize(rows);
    out_rows.resize(rows);
    for (size_t r = 0; r < rows; ++r) {
      const size_t row = w.item->first_row + static_cast<size_t>(w.first_query) + r / group;
      const size_t head = static_cast<size_t>(w.kv_head) * group + r % group;
      q_rows[r] = q + row * q_stride + head * head_dim;
      out_rows[r] = out + row * out_stride + head * head_dim;
    }
    AttentionUnit unit;
    unit.q_rows = q_rows.data();
    unit.rows = rows;
    unit.group = group;
    unit.start = static_cast<size_t>(w.item->start + w.first_query);
    unit.head_dim = head_dim;
    unit.padded_dim = RoundUpToTile(head_dim);
    unit.scale = scale;
    unit.scratch = CarveScratch(rows, head_dim, unit.padded_dim);
    RunUnit(pages, *w.item, w.kv_head, &unit);
    WriteResult(unit, out_rows.data());
  });
}

void WriteKv(const KvPages& pages, const AttentionItem* items, size_t num_items, const float* k,
             const float* v, size_t stride, Threads* threads) {
  const size_t dim = static_cast<size_t>(pages.head_dim);
  const auto write_row = [&](const AttentionItem& item, int i) {
    const int position = item.start + i;
    const int32_t block = item.block_table[position / pages.block_size];
    const size_t offset = static_cast<size_t>(position % pages.block_size) * dim;
    const size_t row = (item.first_row + static_cast<size_t>(i)) * stride;
    for (int head = 0; head < pages.kv_heads; ++head) {
      for (const bool value : {false, true}) {
        const float* from = (value ? v : k) + row + static_cast<size_t>(head) * dim;
        std::byte* page = pages.Page(block, value, head);
        if (pages.element == Element::kFloat32) {
          std::memcpy(reinterpret_cast<float*>(page) + offset, from, dim * sizeof(float));
        } else if (pages.element == Element::kBFloat16) {
          uint16_t* to = reinterpret_cast<uint16_t*>(page) + offset;
          for (size_t d = 0; d < dim; ++d) to[d] = FloatToBF16(from[d]);
        } else {
          uint8_t* to = reinterpret_cast<uint8_t*>(page) + offset;
          for (size_t d = 0; d < dim; ++d) to[d] = FloatToE4M3(from[d]);
        }
      }
    }
  };
  for (size_t n = 0; n < num_items; ++n) {
    const size_t grain = 1 + 8192 / (dim * static_cast<size_t>(pages.kv_heads));
    threads->ForRanges(static_cast<size_t>(items[n].rows), grain, [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i) write_row(items[n], static_cast<int>(i));
    });
  }
}

}  // namespace tandem::engine
#endif

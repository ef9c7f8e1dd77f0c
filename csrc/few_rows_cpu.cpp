#include "few_rows.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "simd.h"

namespace ampo {
namespace {

// Weights times vectors of rows: with the vectors of rows and a factor, what 16 registers hold.
constexpr int kAccumulators = 12;
constexpr int kMaxVectors = 3;
constexpr int64_t kDepth = 256;  // dimensions summed in a row: shorter sums of sums round less
constexpr int64_t kSpan = 24;  // weights that all rows meet while they are in the cache: a multiple of 12, 6 and 4
constexpr int64_t kLine = 64 / sizeof(float);

// A block of rows, transposed: packed[d * width + r], zeros beyond the last row.
struct Block {
  int64_t first, count, width, offset;
};

struct Product {
  const float* weight;
  const float* bias;
  int64_t num_outputs, dim;
  float* out;
};

// sum += one vector of rows at dimension d, times each weight. One vector at a time: an array of two stayed on the stack.
template <int kVectors, size_t V, typename Lanes, size_t... W>
AMPO_INLINE void add(Lanes* sum, const float* from, const float* const* row, int64_t d, std::index_sequence<W...>) {
  Lanes x;
  std::memcpy(&x, from, sizeof(x));
  ((sum[W * kVectors + V] += (row[W][d] - Lanes{}) * x), ...);
}

// sums += the products over the dimensions begin .. end. Index sequences, not loops: the compiler keeps an array in registers
// only where all its indices are constants.
template <int kBytes, int kVectors, size_t... W, size_t... V, size_t... A>
AMPO_INLINE void tile(const float* weight, int64_t dim, int64_t begin, int64_t end, const float* packed, float* sums,
                      std::index_sequence<W...>, std::index_sequence<V...>, std::index_sequence<A...>) {
  using Lanes = typename Vector<float, kBytes>::Type;
  constexpr int kLanes = Vector<float, kBytes>::kLanes;
  const float* const row[] = {weight + W * dim...};
  Lanes sum[sizeof...(A)] = {};
  for (int64_t d = begin; d < end; ++d) {
    if (d % kLine == 0) (__builtin_prefetch(row[W] + sizeof...(W) * dim + d), ...);  // the weights of the next tile
    (add<kVectors, V>(sum, packed + (d * kVectors + V) * kLanes, row, d, std::index_sequence<W...>{}), ...);
  }
  Lanes before[sizeof...(A)];
  std::memcpy(before, sums, sizeof(before));
  ((sum[A] += before[A]), ...);
  (std::memcpy(sums + A * kLanes, &sum[A], kBytes), ...);
}

template <int kBytes, int kVectors, int kWeights>
AMPO_INLINE void outputs(const Product& product, int64_t n, const float* packed, const Block& block) {
  constexpr int64_t kWidth = kVectors * Vector<float, kBytes>::kLanes;
  float sums[kWeights * kWidth] = {};
  for (int64_t d = 0; d < product.dim; d += kDepth) {
    tile<kBytes, kVectors>(product.weight + n * product.dim, product.dim, d, std::min(d + kDepth, product.dim), packed, sums,
                           std::make_index_sequence<kWeights>{}, std::make_index_sequence<kVectors>{},
                           std::make_index_sequence<kWeights * kVectors>{});
  }
  for (int64_t r = 0; r < block.count; ++r) {
    float* out = product.out + (block.first + r) * product.num_outputs + n;
    for (int w = 0; w < kWeights; ++w) out[w] = sums[w * kWidth + r] + (product.bias ? product.bias[n + w] : 0.0f);
  }
}

template <int kBytes, int kVectors>
AMPO_INLINE void span(const Product& product, int64_t begin, int64_t end, const float* packed, const Block& block) {
  constexpr int kWeights = kAccumulators / kVectors;
  int64_t n = begin;
  for (; n + kWeights <= end; n += kWeights) outputs<kBytes, kVectors, kWeights>(product, n, packed, block);
  for (; n < end; ++n) outputs<kBytes, kVectors, 1>(product, n, packed, block);
}

template <int kBytes>
AMPO_INLINE void any_span(const Product& product, int64_t begin, int64_t end, const float* packed, const Block& block) {
  switch (block.width / Vector<float, kBytes>::kLanes) {
    case 1: return span<kBytes, 1>(product, begin, end, packed, block);
    case 2: return span<kBytes, 2>(product, begin, end, packed, block);
    default: return span<kBytes, 3>(product, begin, end, packed, block);
  }
}

void plain(const Product& product, int64_t begin, int64_t end, const float* packed, const Block& block) {
  any_span<16>(product, begin, end, packed, block);
}

#ifdef AMPO_X86
__attribute__((target("avx2,fma"))) void avx2(const Product& product, int64_t begin, int64_t end, const float* packed,
                                              const Block& block) {
  any_span<32>(product, begin, end, packed, block);
}

__attribute__((target("avx512f,fma"))) void avx512(const Product& product, int64_t begin, int64_t end, const float* packed,
                                                   const Block& block) {
  any_span<64>(product, begin, end, packed, block);
}
#endif

struct Kernel {
  void (*run)(const Product&, int64_t begin, int64_t end, const float* packed, const Block&);
  int64_t lanes;
};

Kernel widest() {
#ifdef AMPO_X86
  if (simd() == Simd::kAvx512) return {avx512, 16};
  if (simd() == Simd::kAvx2) return {avx2, 8};
#endif
  return {plain, 4};
}

std::vector<Block> blocks_of(int64_t num_rows, int64_t lanes, int64_t dim) {
  std::vector<Block> blocks;
  int64_t offset = 0, vectors = (num_rows + lanes - 1) / lanes;
  for (int64_t first = 0; vectors > 0;) {
    const int64_t taken = vectors == kMaxVectors + 1 ? 2 : std::min<int64_t>(kMaxVectors, vectors);  // 2 + 2, not 3 + 1
    blocks.push_back({first, std::min(taken * lanes, num_rows - first), taken * lanes, offset});
    first += taken * lanes;
    offset += taken * lanes * dim;
    vectors -= taken;
  }
  return blocks;
}

}  // namespace

void few_rows_cpu(const float* x, int64_t num_rows, const float* weight, const float* bias, int64_t num_outputs, int64_t dim,
                  float* out) {
  const Kernel kernel = widest();
  const std::vector<Block> blocks = blocks_of(num_rows, kernel.lanes, dim);
  if (blocks.empty()) return;
  std::vector<float> packed(blocks.back().offset + blocks.back().width * dim, 0.0f);
  const Product product{weight, bias, num_outputs, dim, out};
  const int64_t num_spans = (num_outputs + kSpan - 1) / kSpan;
#pragma omp parallel if (num_spans > 1)
  {
    // A thread writes whole lines: lines shared by rows of two threads cost more than the product.
#pragma omp for schedule(static)
    for (int64_t d = 0; d < dim; ++d) {
      for (const Block& block : blocks) {
        float* const to = packed.data() + block.offset + d * block.width;
        for (int64_t r = 0; r < block.count; ++r) to[r] = x[(block.first + r) * dim + d];
      }
    }
#pragma omp for schedule(static)
    for (int64_t s = 0; s < num_spans; ++s) {
      const int64_t begin = s * kSpan, end = std::min(begin + kSpan, num_outputs);
      for (const Block& block : blocks) kernel.run(product, begin, end, packed.data() + block.offset, block);
    }
  }
}

}  // namespace ampo

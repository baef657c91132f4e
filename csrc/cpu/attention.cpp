// Attention without a mask, forward: FlashAttention-2 (Dao 2023), algorithm 1, on the CPU. A task
// is a block of queries of one head; it goes through the keys in tiles, and where all keys fit into
// one tile this is the plain softmax in two passes. Scores are kept transposed, queries in lanes:
// the softmax's reductions then never cross lanes.
#include "cpu/attention.h"

#include <cstdint>
#include <limits>

#include "cpu/exponential.h"
#include "cpu/kernels.h"
#include "runtime/thread_pool.h"

namespace advkd::ADVKD_ISA {
namespace {

constexpr std::int64_t kQueryBlock = 64;
constexpr std::int64_t kKeyTile = 512;

// Packs a tile of scores, and raises each query's maximum.
template <class T>
struct StoreScores {
  T* scores;
  std::int64_t block;
  T* highest;

  template <int kRows, int kVectors>
  void operator()(std::int64_t row, std::int64_t vector,
                  const Tile<T, kRows, kVectors>& tile) const {
    constexpr int lanes = kLanesOf<T>;
    for (int v = 0; v < kVectors; ++v) {
      T* const to = scores + (vector + v) * block + row * lanes;
      VectorOf<T> high = load_vector(highest + (vector + v) * lanes);
      for (int r = 0; r < kRows; ++r) {
        const VectorOf<T> score = tile.part[r][v];
        store_vector(to + r * lanes, score);
        high = score > high ? score : high;
      }
      store_vector(highest + (vector + v) * lanes, high);
    }
  }
};

// out = (carry * out + tile) * gain, row by row; the first tile of keys finds nothing in out.
template <class T>
struct StoreOutput {
  OutRows<T> out;
  std::int64_t head_dim;
  const T *carry, *gain;
  bool first;

  template <int kRows, int kVectors>
  void operator()(std::int64_t row, std::int64_t vector,
                  const Tile<T, kRows, kVectors>& tile) const {
    constexpr int lanes = kLanesOf<T>;
    for (int r = 0; r < kRows; ++r) {
      T* const to = out.at + (row + r) * out.stride;
      for (int v = 0; v < kVectors; ++v) {
        const std::int64_t column = (vector + v) * lanes;
        VectorOf<T> sum = tile.part[r][v];
        if (!first) sum += load_first(to + column, head_dim - column) * carry[row + r];
        store_first(to + column, sum * gain[row + r], head_dim - column);
      }
    }
  }
};

// One block of queries of one head. Scores are base-2 logarithms.
template <class T>
class QueryBlock {
 public:
  QueryBlock(const AttentionArgs<T>& args, const Parts<T>& queries, const Parts<T>& keys,
             std::int64_t task, T* memory)
      : args_(args),
        keys_(keys),
        sample_(task / queries.count / args.shape.heads),
        head_(task / queries.count % args.shape.heads),
        first_(task % queries.count * queries.size),
        count_(queries.size_of(task % queries.count)),
        vectors_(divided_up(count_, kLanes)),
        head_vectors_(divided_up(args.shape.head_dim, kLanes)),
        highest_(memory),
        sum_(highest_ + vectors_ * kLanes),
        carry_(sum_ + vectors_ * kLanes),
        gain_(carry_ + vectors_ * kLanes),
        q_(gain_ + vectors_ * kLanes),
        scores_(q_ + vectors_ * kLanes * args.shape.head_dim),
        values_(scores_ + vectors_ * kLanes * keys.size) {}

  static std::int64_t memory_size(const AttentionShape& shape, const Parts<T>& queries,
                                  const Parts<T>& keys) {
    const std::int64_t head_lanes = divided_up(shape.head_dim, kLanes) * kLanes;
    return queries.size * (shape.head_dim + keys.size + 4) + head_lanes * keys.size;
  }

  void run() const {
    const T factor = static_cast<T>(static_cast<double>(args_.scale) * kLog2E);
    pack_transposed(rows_of(args_.q, sample_, head_, first_), count_, args_.shape.head_dim, factor,
                    q_);
    for (std::int64_t i = 0; i < vectors_ * kLanes; ++i) {
      highest_[i] = -std::numeric_limits<T>::infinity();
      sum_[i] = T(0);
    }
    for (std::int64_t tile = 0; tile < keys_.count; ++tile) attend(tile);
    store_lse();
  }

 private:
  static constexpr int kLanes = kLanesOf<T>;
  using Vector = VectorOf<T>;

  void attend(std::int64_t tile) const {
    const std::int64_t start = tile * keys_.size, keys = keys_.size_of(tile);
    const std::int64_t head_dim = args_.shape.head_dim, block = keys * kLanes;
    const bool last = tile + 1 == keys_.count;
    for (std::int64_t i = 0; i < vectors_ * kLanes; ++i) carry_[i] = highest_[i];
    multiply<T>(rows_of(args_.k, sample_, head_, start), BOperand<T>{q_, kLanes, head_dim * kLanes},
                keys, vectors_, head_dim, StoreScores<T>{scores_, block, highest_});
    for (std::int64_t v = 0; v < vectors_; ++v) {
      exponentiate(v * kLanes, scores_ + v * block, keys, last);
    }
    const BOperand<T> values =
        b_operand(rows_of(args_.v, sample_, head_, start), keys, head_dim, values_);
    const StoreOutput<T> store = {out_rows_of(args_.out, sample_, head_, first_), head_dim, carry_,
                                  gain_, tile == 0};
    multiply<T>(PackedColumns<T>{scores_, block}, values, count_, head_vectors_, keys, store);
  }

  // Replaces the scores of the queries [lane, lane + kLanes) by weights relative to their maximum.
  // carry: by what the sums over earlier tiles shrink, as their maximum was lower.
  void exponentiate(std::int64_t lane, T* scores, std::int64_t keys, bool last) const {
    const T infinity = std::numeric_limits<T>::infinity();
    const Vector highest = load_vector(highest_ + lane);
    // While all scores are -inf their weights are 0, as they will be if a later one is finite.
    const Vector origin = highest == -infinity ? Vector{} : highest;
    const Vector carry = exp2_of(load_vector(carry_ + lane) - origin);
    Vector sum = {};
    for (std::int64_t k = 0; k < keys; ++k, scores += kLanes) {
      const Vector weight = exp2_of(load_vector(scores) - origin);
      store_vector(scores, weight);
      sum += weight;
    }
    sum += load_vector(sum_ + lane) * carry;
    store_vector(carry_ + lane, carry);
    store_vector(sum_ + lane, sum);
    store_vector(gain_ + lane, last ? T(1) / sum : Vector{} + T(1));
  }

  void store_lse() const {
    const std::int64_t heads = args_.shape.heads, queries = args_.shape.queries;
    T* const lse = args_.lse + (sample_ * heads + head_) * queries + first_;
    for (std::int64_t lane = 0; lane < count_; lane += kLanes) {
      const Vector value =
          load_vector(highest_ + lane) * static_cast<T>(kLn2) + log_of(load_vector(sum_ + lane));
      store_first(lse + lane, value, count_ - lane);
    }
  }

  const AttentionArgs<T>& args_;
  const Parts<T>& keys_;
  const std::int64_t sample_, head_, first_, count_, vectors_, head_vectors_;
  // For each query: the highest score so far, the sum of weights, and what StoreOutput multiplies
  // by.
  T *const highest_, *const sum_, *const carry_, *const gain_;
  T *const q_, *const scores_, *const values_;  // packed: scaled queries, a tile's scores, values
};

}  // namespace

std::int64_t attention_workspace(const AttentionShape& shape, int threads) {
  const Parts<float> queries(shape.queries, kQueryBlock), keys(shape.keys, kKeyTile);
  return threads * QueryBlock<float>::memory_size(shape, queries, keys);
}

template <class T>
void attention(const AttentionArgs<T>& args) {
  const AttentionShape& shape = args.shape;
  if (shape.batch * shape.heads * shape.queries == 0) return;
  const Parts<T> queries(shape.queries, kQueryBlock), keys(shape.keys, kKeyTile);
  const std::int64_t size = QueryBlock<T>::memory_size(shape, queries, keys);
  const Buffer<T> own(args.workspace == nullptr ? args.threads * size : 0);
  T* const memory = args.workspace == nullptr ? own.data() : args.workspace;
  for_each_slot(shape.batch * shape.heads * queries.count, args.threads,
                [&](std::int64_t task, std::int64_t slot) {
                  QueryBlock<T>(args, queries, keys, task, memory + slot * size).run();
                });
}

template void attention(const AttentionArgs<float>& args);
template void attention(const AttentionArgs<double>& args);

}  // namespace advkd::ADVKD_ISA

// Attention without a mask, backward: FlashAttention-2 (Dao 2023), algorithm 2, on the CPU. The
// keys of a head are cut into ranges, of which each sums its share of dq by itself, and the shares
// are added in order. The ranges follow from the shape, so the result does not depend on how many
// threads there are; only whether a task takes all ranges of a head or one of them does. Every row
// of dk and dv has one writer.
#include <cstdint>
#include <limits>

#include "cpu/attention.h"
#include "cpu/exponential.h"
#include "cpu/kernels.h"
#include "runtime/thread_pool.h"

namespace advkd::ADVKD_ISA {
namespace {

constexpr std::int64_t kQueryBlock = 128;
constexpr std::int64_t kKeyBlock = 128;
constexpr std::int64_t kShares = 8;  // ranges of all heads together, where they are long enough

// Weights exp(score - lse), packed; one lse for each lane.
template <class T>
struct StoreWeights {
  T* weights;
  std::int64_t block;
  const T* lse;

  template <int kRows, int kVectors>
  void operator()(std::int64_t row, std::int64_t vector,
                  const Tile<T, kRows, kVectors>& tile) const {
    constexpr int lanes = kLanesOf<T>;
    for (int v = 0; v < kVectors; ++v) {
      T* const to = weights + (vector + v) * block + row * lanes;
      const VectorOf<T> origin = load_vector(lse + (vector + v) * lanes);
      for (int r = 0; r < kRows; ++r) {
        store_vector(to + r * lanes, exp2_of(tile.part[r][v] - origin));
      }
    }
  }
};

// The softmax's gradient, weight * (tile - delta), in the weights' place.
template <class T>
struct StoreScoreGradients {
  T* weights;
  std::int64_t block;
  const T* delta;

  template <int kRows, int kVectors>
  void operator()(std::int64_t row, std::int64_t vector,
                  const Tile<T, kRows, kVectors>& tile) const {
    constexpr int lanes = kLanesOf<T>;
    for (int v = 0; v < kVectors; ++v) {
      T* const to = weights + (vector + v) * block + row * lanes;
      const VectorOf<T> origin = load_vector(delta + (vector + v) * lanes);
      for (int r = 0; r < kRows; ++r) {
        store_vector(to + r * lanes, load_vector(to + r * lanes) * (tile.part[r][v] - origin));
      }
    }
  }
};

// A block's share of a gradient: the first is stored, the others are added.
template <class T>
struct AddRows {
  OutRows<T> out;
  std::int64_t columns;
  bool first;

  template <int kRows, int kVectors>
  void operator()(std::int64_t row, std::int64_t vector,
                  const Tile<T, kRows, kVectors>& tile) const {
    constexpr int lanes = kLanesOf<T>;
    for (int r = 0; r < kRows; ++r) {
      T* const to = out.at + (row + r) * out.stride;
      for (int v = 0; v < kVectors; ++v) {
        const std::int64_t column = (vector + v) * lanes, rest = columns - column;
        VectorOf<T> sum = tile.part[r][v];
        if (!first) sum += load_first(to + column, rest);
        store_first(to + column, sum, rest);
      }
    }
  }
};

template <class T>
T dot(const T* a, const T* b, std::int64_t n) {
  VectorOf<T> sums = {};
  for (std::int64_t i = 0; i < n; i += kLanesOf<T>) {
    sums += load_first(a + i, n - i) * load_first(b + i, n - i);
  }
  T sum = T(0);
  for (int i = 0; i < kLanesOf<T>; ++i) sum += sums[i];
  return sum;
}

template <class T>
void add_row(const T* from, T* to, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += kLanesOf<T>) {
    store_first(to + i, load_first(to + i, n - i) + load_first(from + i, n - i), n - i);
  }
}

// How the work is cut.
template <class T>
struct Split {
  Parts<T> queries, ranges;
  std::int64_t heads;   // of all samples together
  std::int64_t padded;  // head_dim, up to whole vectors

  explicit Split(const AttentionShape& shape)
      : queries(shape.queries, kQueryBlock),
        ranges(shape.keys, longest_range(shape)),
        heads(shape.batch * shape.heads),
        padded(divided_up(shape.head_dim, kLanesOf<T>) * kLanesOf<T>) {}

  static std::int64_t longest_range(const AttentionShape& shape) {
    const std::int64_t wanted = divided_up(kShares, shape.batch * shape.heads);
    const std::int64_t blocks = divided_up(divided_up(shape.keys, wanted), kKeyBlock);
    return blocks * kKeyBlock;
  }
};

// Ranges of keys of one head. Scores are base-2 logarithms.
template <class T>
class KeyRanges {
 public:
  // `shares` takes the shares of dq of the ranges [1, ...) of all heads; null where this task
  // takes all ranges of its head.
  KeyRanges(const AttentionBackwardArgs<T>& args, const Split<T>& split, std::int64_t task,
            T* shares)
      : args_(args),
        split_(split),
        head_of_all_(shares ? task / split.ranges.count : task),
        sample_(head_of_all_ / args.shape.heads),
        head_(head_of_all_ % args.shape.heads),
        first_range_(shares ? task % split.ranges.count : 0),
        end_range_(shares ? first_range_ + 1 : split.ranges.count),
        shares_(shares),
        largest_block_(smaller(split.ranges.size, kKeyBlock)),
        memory_(split.queries.size * (5 * split.padded + largest_block_ + 2) +
                largest_block_ * split.padded),
        lse_(memory_.data()),
        delta_(lse_ + split.queries.size),
        q_lanes_(delta_ + split.queries.size),
        grad_lanes_(q_lanes_ + split.queries.size * split.padded),
        q_packed_(grad_lanes_ + split.queries.size * split.padded),
        grad_packed_(q_packed_ + split.queries.size * split.padded),
        share_(grad_packed_ + split.queries.size * split.padded),
        k_packed_(share_ + split.queries.size * split.padded),
        weights_(k_packed_ + largest_block_ * split.padded) {}

  void run() const {
    for (std::int64_t i = 0; i < split_.queries.count; ++i) {
      const Queries queries = prepared(i);
      for (std::int64_t r = first_range_; r < end_range_; ++r) {
        const OutRows<T> dq = dq_of(r, queries.first);
        const Parts<T> keys(split_.ranges.size_of(r), kKeyBlock);
        for (std::int64_t block = 0; block < keys.count; ++block) {
          add_block(queries, r * split_.ranges.size + block * keys.size, keys.size_of(block), dq,
                    block == 0);
        }
        if (dq.at == share_) add_share(queries);
      }
    }
  }

 private:
  static constexpr int kLanes = kLanesOf<T>;

  // A block of queries, ready for the products.
  struct Queries {
    std::int64_t first, count, vectors;
    BOperand<T> q_lanes, grad_lanes, q, grad;
  };

  Queries prepared(std::int64_t block) const {
    const std::int64_t first = block * split_.queries.size, count = split_.queries.size_of(block);
    const std::int64_t vectors = divided_up(count, kLanes), head_dim = args_.shape.head_dim;
    const ByRows<T> q = rows_of(args_.q, sample_, head_, first);
    const ByRows<T> grad = rows_of(args_.grad_out, sample_, head_, first);
    const T factor = static_cast<T>(static_cast<double>(args_.scale) * kLog2E);
    pack_transposed(q, count, head_dim, factor, q_lanes_);
    pack_transposed(grad, count, head_dim, args_.scale, grad_lanes_);
    const ByRows<T> out = rows_of<T>(
        {args_.out.at, args_.out.batch, args_.out.head, args_.out.row}, sample_, head_, first);
    const T* const lse =
        args_.lse + (sample_ * args_.shape.heads + head_) * args_.shape.queries + first;
    for (std::int64_t i = 0; i < vectors * kLanes; ++i) {
      lse_[i] = i < count ? lse[i] * static_cast<T>(kLog2E) : T(0);
      delta_[i] = i < count ? dot(grad.start(i), out.start(i), head_dim) * args_.scale : T(0);
    }
    return {first, count, vectors, {q_lanes_, kLanes, head_dim * kLanes},
            {grad_lanes_, kLanes, head_dim * kLanes}, b_operand(q, count, head_dim, q_packed_),
            b_operand(grad, count, head_dim, grad_packed_)};
  }

  // Where a range's share of dq is summed: the first range's is dq itself, to which the others' are
  // added.
  OutRows<T> dq_of(std::int64_t range, std::int64_t query) const {
    if (range == 0) return out_rows_of(args_.dq, sample_, head_, query);
    const std::int64_t head_dim = args_.shape.head_dim;
    if (!shares_) return {share_, head_dim};
    const std::int64_t share = head_of_all_ * (split_.ranges.count - 1) + range - 1;
    return {shares_ + (share * args_.shape.queries + query) * head_dim, head_dim};
  }

  void add_share(const Queries& queries) const {
    const std::int64_t head_dim = args_.shape.head_dim;
    const OutRows<T> dq = dq_of(0, queries.first);
    for (std::int64_t i = 0; i < queries.count; ++i) {
      add_row(share_ + i * head_dim, dq.at + i * dq.stride, head_dim);
    }
  }

  // One block of keys, from `start`: dk and dv, and its part of a share of dq.
  void add_block(const Queries& queries, std::int64_t start, std::int64_t keys,
                 const OutRows<T>& dq, bool first_keys) const {
    const std::int64_t head_dim = args_.shape.head_dim, head_vectors = split_.padded / kLanes;
    const std::int64_t block = keys * kLanes;
    const ByRows<T> k = rows_of(args_.k, sample_, head_, start);
    const ByRows<T> v = rows_of(args_.v, sample_, head_, start);
    const bool first_queries = queries.first == 0;
    const PackedRows<T> by_keys = {weights_, block};

    multiply<T>(k, queries.q_lanes, keys, queries.vectors, head_dim,
                StoreWeights<T>{weights_, block, lse_});
    multiply<T>(by_keys, queries.grad, keys, head_vectors, queries.count,
                AddRows<T>{out_rows_of(args_.dv, sample_, head_, start), head_dim, first_queries});
    multiply<T>(v, queries.grad_lanes, keys, queries.vectors, head_dim,
                StoreScoreGradients<T>{weights_, block, delta_});
    multiply<T>(by_keys, queries.q, keys, head_vectors, queries.count,
                AddRows<T>{out_rows_of(args_.dk, sample_, head_, start), head_dim, first_queries});
    multiply<T>(PackedColumns<T>{weights_, block}, b_operand(k, keys, head_dim, k_packed_),
                queries.count, head_vectors, keys, AddRows<T>{dq, head_dim, first_keys});
  }

  const AttentionBackwardArgs<T>& args_;
  const Split<T>& split_;
  const std::int64_t head_of_all_, sample_, head_, first_range_, end_range_;
  T* const shares_;
  const std::int64_t largest_block_;
  const Buffer<T> memory_;
  T *const lse_, *const delta_;  // for each query: log of the sum, and sum of grad_out * out
  T *const q_lanes_, *const grad_lanes_, *const q_packed_, *const grad_packed_;
  T *const share_, *const k_packed_, *const weights_;
};

// Adds the shares of the ranges [1, ...) of one head to rows of its dq.
template <class T>
void add_shares(const AttentionBackwardArgs<T>& args, const Split<T>& split, const T* shares,
                std::int64_t head, std::int64_t first, std::int64_t rows) {
  const std::int64_t head_dim = args.shape.head_dim, size = args.shape.queries * head_dim;
  const T* const from = shares + head * (split.ranges.count - 1) * size + first * head_dim;
  const OutRows<T> dq =
      out_rows_of(args.dq, head / args.shape.heads, head % args.shape.heads, first);
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t r = 0; r + 1 < split.ranges.count; ++r) {
      add_row(from + r * size + i * head_dim, dq.at + i * dq.stride, head_dim);
    }
  }
}

}  // namespace

template <class T>
void attention_backward(const AttentionBackwardArgs<T>& args) {
  const AttentionShape& shape = args.shape;
  if (shape.batch * shape.heads * shape.queries == 0) return;
  const Split<T> split(shape);
  // Where ranges are tasks of their own, each prepares the queries itself.
  const bool apart = split.heads < args.threads && split.ranges.count > 1;
  const Buffer<T> shares(
      apart ? split.heads * (split.ranges.count - 1) * shape.queries * shape.head_dim : 0);
  parallel_for(split.heads * (apart ? split.ranges.count : 1), args.threads,
               [&](std::int64_t task) {
                 KeyRanges<T>(args, split, task, apart ? shares.data() : nullptr).run();
               });
  if (!apart) return;
  parallel_for(split.heads * split.queries.count, args.threads, [&](std::int64_t task) {
    const std::int64_t head = task / split.queries.count, block = task % split.queries.count;
    add_shares(args, split, shares.data(), head, block * split.queries.size,
               split.queries.size_of(block));
  });
}

template void attention_backward(const AttentionBackwardArgs<float>& args);
template void attention_backward(const AttentionBackwardArgs<double>& args);

}  // namespace advkd::ADVKD_ISA

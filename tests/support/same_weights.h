// Whether two loads of a model gave the same weights, bit for bit.
#pragma once

#include <cstring>

#include "gtest/gtest.h"

#include "engine/model/model_weights.h"

namespace tandem::engine {

inline bool Same(const Buffer& a, const Buffer& b) {
  return a.size() == b.size() && (a.size() == 0 || std::memcmp(a.data(), b.data(), a.size()) == 0);
}

inline bool Same(const LinearWeights& a, const LinearWeights& b) {
  return Same(a.memory, b.memory) && Same(a.bias.memory, b.bias.memory) &&
         a.matrix.n == b.matrix.n && a.matrix.k == b.matrix.k &&
         a.matrix.element == b.matrix.element;
}

inline void ExpectSame(const ModelWeights& a, const ModelWeights& b) {
  ASSERT_EQ(a.layers.size(), b.layers.size());
  for (size_t i = 0; i < a.layers.size(); ++i) {
    const LayerWeights &x = a.layers[i], &y = b.layers[i];
    EXPECT_TRUE(Same(x.qkv, y.qkv)) << i;
    EXPECT_TRUE(Same(x.output, y.output)) << i;
    EXPECT_TRUE(Same(x.gate_up, y.gate_up)) << i;
    EXPECT_TRUE(Same(x.down, y.down)) << i;
    EXPECT_TRUE(Same(x.input_norm.memory, y.input_norm.memory)) << i;
    EXPECT_TRUE(Same(x.post_attention_norm.memory, y.post_attention_norm.memory)) << i;
    EXPECT_TRUE(Same(x.q_norm.memory, y.q_norm.memory)) << i;
    EXPECT_TRUE(Same(x.k_norm.memory, y.k_norm.memory)) << i;
  }
  EXPECT_TRUE(Same(a.head, b.head));
  EXPECT_TRUE(Same(a.final_norm.memory, b.final_norm.memory));
  ASSERT_EQ(a.embedding.bytes, b.embedding.bytes);
  EXPECT_EQ(std::memcmp(a.embedding_data(), b.embedding_data(), a.embedding.bytes), 0);
  EXPECT_EQ(a.digest, b.digest);
}

}  // namespace tandem::engine

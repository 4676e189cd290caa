// word_relevance: how much each answer of a prompt needs each of its blocks, by the words they
// share.
#pragma once

#include "lemo/tensor.h"

namespace lemo {

/// One sequence of S tokens and A answers; a word is a token id. Answer a has the tokens firsts[a]
/// + 1 to ends[a], those that its rows predict. A token of the prompt counts for it if it stands at
/// firsts[a] or before, in a block that holds none of these rows of any answer.
///
/// Two scores of a block, each divided by its sum over the blocks; the larger one counts:
/// - the words of the answer and of the 16 tokens before it that stand in the block, each
///   log(blocks / blocks that have the word);
/// - the square of the most that the words around the answer's place weigh in any 16 tokens that
///   overlap the block, each log(S / occurrences). The answer's place is the end of the 16 tokens
///   in which its own words weigh most, and the words around it are those of the 24 tokens up to it
///   and of the 8 behind. Zero where no word of the answer counts.
struct WordRelevanceParams {
    Tensor ids;          // [S] int64, at least 0
    Tensor firsts;       // [A] int64, ascending rows that predict the first token of each answer
    Tensor ends;         // [A] int64, one more than the last row; at most S
    int64_t block_size;  // the last block may be shorter
    Tensor relevance;    // [A, B] float32, written
};

void check(const WordRelevanceParams& params);

/// On the host only: choosing is a matter of milliseconds.
void word_relevance_cpu(const WordRelevanceParams& params);

}  // namespace lemo

// From scores per head to the tokens that stay, the same in all heads, or to the rows that each head keeps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvp {

// One score per token: the mean over heads of z-scores, each head standardised over the tokens that
// compete (heads score on scales of their own: a K-norm of 3 is small in one and large in another).
//   scores  f32 [n_head, n];  competes uint8 [n];  result f64 [n], 0 where competes is 0
// A head without spread says nothing; a score that is not finite loses against every finite one.
std::vector<double> token_scores(const float * scores, size_t n_head, size_t n, const uint8_t * competes);

// Which of n tokens stay: all protected ones, then whole units by mean score while they fit.
//   unit    int32 [n]: neighbours with equal numbers stay or go together
//   A unit with a protected token is protected. Equal scores favour the newer unit. keep uint8 [n].
void choose_tokens(const double * scores, const int32_t * unit, const uint8_t * is_protected, size_t n, size_t budget,
                   uint8_t * keep);

// One head's rows, in ascending order of what they stand for.
//   scores     f32 [n]; larger = keep; what is not finite goes first
//   unit       int32 [n], ascending; rows with one number (a chat-template marker) stay or go together
//   is_protected uint8 [n]; a unit with a protected row is protected
//   n_keep     rows to keep
//   keep       int32 [n_keep], ascending
//
// Protected units first, then whole units by mean score while they fit; equal scores favour the newer.
// Only if nothing but units larger than the rest of the room is left is one of them cut, its newest
// rows staying: all heads of a cache must keep the same number. Fails if more than n_keep are protected.
void choose_rows(const float * scores, const int32_t * unit, const uint8_t * is_protected, size_t n, size_t n_keep, int32_t * keep);

} // namespace kvp

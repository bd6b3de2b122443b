/* kvp_edge: the native part of learned KV-cache eviction inside stock llama.cpp.
 *
 * This is the whole public surface. It works on a llama_context that somebody else owns, uses only
 * llama.h, ggml*.h and gguf.h, and knows nothing of budgets or turns: it reads the keys and values of
 * a token range, scores and ranks them, and removes the tokens, or packs the rows, it is told to.
 *
 * Conventions
 *   - A function returns KVP_OK (0) or the code that it also stores in *err (err may be NULL).
 *     No exception crosses this header, and nothing aborts on bad arguments.
 *   - The conversation is sequence 0. Sequence 1 is ours: it tags cells while they are read and is
 *     empty between calls. So the context needs n_seq_max >= 2 and kv_unified = true.
 *   - "Position" is llama_pos, the number in llama.cpp's cell table. A removed token's neighbours keep
 *     theirs; a packed cache has new ones, and what they stand for is the caller's to remember.
 *   - A "row" is what one cell holds; row r has the r-th smallest position of the sequence.
 *   - Arrays are dense, row-major, little-endian; [n_layer, n_head_kv, n, head_size] counts only the
 *     layers of the base cache (models with sliding-window layers keep those in a second cache).
 *   - A kvp_cache must not be used by two threads at once, nor outlive its llama_context. Different caches may
 *     be, and a kvp_policy may be shared by them: threads that score with it take turns.
 */
#ifndef KVP_EDGE_H
#define KVP_EDGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#    define KVP_API __declspec(dllexport)
#else
#    define KVP_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct llama_context;

/* Raised whenever a signature or a struct below changes; the Python side refuses another number. */
#define KVP_ABI_VERSION 12

/* llama.cpp's own limit (LLAMA_MAX_LAYERS in src/llama-hparams.h). */
#define KVP_MAX_LAYERS 512

enum kvp_status {
    KVP_OK              = 0,
    KVP_ERR_ARGUMENT    = 1, /* a caller's mistake: out of range, wrong order, NULL              */
    KVP_ERR_FILE        = 2, /* missing, truncated or foreign model file                         */
    KVP_ERR_UNSUPPORTED = 3, /* a model or cache that cannot be handled safely                   */
    KVP_ERR_LAYOUT      = 4, /* the state blob is not laid out as this build expects             */
    KVP_ERR_RUNTIME     = 5, /* llama.cpp refused or failed; the cache may have changed          */
    KVP_ERR_MEMORY      = 6, /* out of memory                                                    */
    KVP_NOT_IN_PLACE    = 7, /* no failure: rows must be read where this was asked (kvp_cache_score) */
};

/* A token's numbers, as docs/glossary.md tells them apart. */
typedef int32_t  kvp_token_index;    /* in the conversation, from 0                                      */
typedef int32_t  kvp_llama_position; /* llama_pos: the number in llama.cpp's cell table                   */
typedef int32_t  kvp_rope_position;  /* that a cached key is rotated to                                   */
typedef int32_t  kvp_row;            /* row r has the r-th smallest llama.cpp position of the sequence    */
typedef uint32_t kvp_cell_index;     /* in llama.cpp's cache: internal, no function takes or gives it     */

typedef struct kvp_error {
    int32_t code;         /* enum kvp_status */
    char    message[512]; /* a sentence in UTF-8, zero-terminated */
} kvp_error;

/* Versions. kvp_built_for() is the llama-cpp-python version whose headers this library was compiled
 * against, kvp_built_llama_version() what llama.cpp called itself then; both are static strings. */
KVP_API int32_t      kvp_abi_version(void);
KVP_API const char * kvp_built_for(void);
KVP_API const char * kvp_built_llama_version(void);
/* What the llama.cpp library in this process calls itself (llama_version() in llama.h). */
KVP_API const char * kvp_loaded_llama_version(void);

/* What a GGUF file says of its model, read from the metadata alone (no tensor is loaded). */
typedef struct kvp_model_shape {
    char     architecture[64];
    uint32_t n_ctx_train;               /* tokens the model was trained to read                  */
    uint32_t n_layer;
    uint32_t head_size_k;               /* {arch}.attention.key_length or n_embd / n_head         */
    uint32_t head_size_v;
    uint32_t sliding_window;            /* tokens, 0 when the file names none: llama.cpp may ignore
                                           it or know another (llama_model_n_swa of the model)    */
    uint32_t n_head_kv[KVP_MAX_LAYERS]; /* first n_layer entries                                  */
} kvp_model_shape;

KVP_API int32_t kvp_model_shape_read(const char * path, kvp_model_shape * shape, kvp_error * err);

/* Bytes of one cell over all layers, K and V, for ggml types type_k and type_v (enum ggml_type).
 * An upper bound for models with sliding-window layers, whose window cache may have fewer cells. */
KVP_API int32_t kvp_model_bytes_per_cell(const kvp_model_shape * shape, int32_t type_k, int32_t type_v,
                                         uint64_t * bytes, kvp_error * err);

/* The tensors of a GGUF file, one line for each: "name type ne0 ne1 ne2 ne3 offset bytes", the offset
 * counted from the start of the file. *needed tells how many bytes `text` must have, the closing zero
 * included; with fewer (0, say) nothing is written. */
KVP_API int32_t kvp_model_tensors(const char * path, char * text, uint64_t size, uint64_t * needed, kvp_error * err);

/* Observes a context while it computes: shows the nodes of its graphs to all who subscribe to it, which are caches
 * (kvp_cache_open), logs of queries (kvp_queries_create) and captures of attention (kvp_capture_create), in any
 * order, and any number of them. Attach it before the context is made:
 *     params.cb_eval = kvp_observer_callback();  params.cb_eval_user_data = observer;
 * The observer must outlive the context. A subscriber is created and freed while the context does not compute, and
 * may be freed before the observer or after it. */
struct ggml_tensor;
typedef struct kvp_observer kvp_observer;
typedef bool (*kvp_eval_callback)(struct ggml_tensor * node, bool ask, void * user_data);

/* next: a callback of somebody else that is shown the nodes, too, with next_data; or NULL. */
KVP_API int32_t           kvp_observer_create(kvp_eval_callback next, void * next_data, kvp_observer ** observer,
                                              kvp_error * err);
KVP_API void              kvp_observer_free(kvp_observer * observer); /* NULL is allowed */
KVP_API kvp_eval_callback kvp_observer_callback(void);

typedef struct kvp_cache kvp_cache;

/* The layout of the base cache, as read back from a real state blob when the cache was opened. */
typedef struct kvp_cache_shape {
    uint32_t n_layer;
    uint32_t n_head_kv;
    uint32_t head_size_k;
    uint32_t head_size_v;
    int32_t  type_k;         /* enum ggml_type */
    int32_t  type_v;         /* enum ggml_type */
    uint32_t v_transposed;   /* 1 when flash attention is off */
    uint32_t has_window;     /* 1 when a sliding-window cache follows the base cache */
    uint32_t k_hadamard_block; /* block of the Hadamard rotation that K is stored under, 0 = none */
    uint32_t v_hadamard_block;
    uint64_t bytes_per_cell;   /* of the base cache, K and V, all layers */
} kvp_cache_shape;

/* Opens the cache of an EMPTY context: refuses what cannot be handled (recurrent, hybrid, encoder or
 * diffusion models, positions of more than one number, caches without sequence 1), then decodes three
 * tokens, reads them back, removes the middle one, checks every count, and clears the cache again.
 * So a model that opens is a model whose blob was understood and whose cache can lose its middle.
 *
 * With the context's observer the cache is found where it lies, and the cell of every new token is known: it is
 * scored and packed there, through pointers in host memory, by ggml graphs on a device, so that only cell numbers
 * and scores cross. Where that is not possible, or a token's cell is not known, or `observer` is NULL, it goes
 * through llama.cpp's state: the result is the same, and the cells are known again after a state has been packed. */
KVP_API int32_t kvp_cache_open(struct llama_context * ctx, kvp_observer * observer, kvp_cache ** cache,
                               kvp_error * err);
KVP_API void    kvp_cache_close(kvp_cache * cache); /* NULL is allowed */
KVP_API void    kvp_cache_get_shape(const kvp_cache * cache, kvp_cache_shape * shape);

typedef struct kvp_cache_location {
    uint32_t known;      /* 1: worked on where it lies; 0: through llama.cpp's state                      */
    uint32_t on_device;  /* 1: some of it lies in memory that the host does not see                       */
    uint32_t can_pack;   /* 1: heads can be packed there; 0 on devices where they are no whole 32-bit words */
    uint32_t packed_in_place;   /* how often heads were packed there                                      */
    uint32_t packed_as_state;   /* and how often as a state                                               */
    uint64_t bytes_transferred; /* bytes carried so far between the cache and the host: scores and cell numbers,
                                   and the states taken and given where it went through these             */
    char     where[256];        /* the devices, with commas; or why it is not known                       */
} kvp_cache_location;

KVP_API void kvp_cache_get_location(const kvp_cache * cache, kvp_cache_location * location);

/* The owner of an observed context tells what it does itself: after a llama_decode that went well, that it
 * read n tokens at positions first, first + 1, ...; and to forget all cells after it has put tokens into the
 * cache in any other way (llama_state_set_data). Removed and cleared tokens need not be told. */
KVP_API int32_t kvp_cache_appended(kvp_cache * cache, kvp_llama_position first, uint32_t n, kvp_error * err);
KVP_API void    kvp_cache_forget(kvp_cache * cache);

/* Compares the cells of the tokens at `present` (int32 [n], ascending: every position of sequence 0) with
 * llama.cpp's state, byte for byte: KVP_ERR_RUNTIME if they differ; *known is 0 if not all cells are known.
 * Without NDEBUG this is done before every packing. */
KVP_API int32_t kvp_cache_check_cells(kvp_cache * cache, const kvp_llama_position * present, uint32_t n,
                                      uint32_t * known, kvp_error * err);

/* Reads the tokens of sequence 0 at positions [p0, p1), de-quantised and with llama.cpp's Hadamard
 * rotation undone (RoPE stays in the keys).
 *   n          number of tokens the caller expects there; another number is KVP_ERR_ARGUMENT
 *   positions  int32 [n], ascending
 *   keys       f32 [n_layer, n_head_kv, n, head_size_k] or NULL
 *   values     f32 [n_layer, n_head_kv, n, head_size_v] or NULL                                   */
KVP_API int32_t kvp_cache_read(kvp_cache * cache, kvp_llama_position p0, kvp_llama_position p1, uint32_t n,
                               kvp_llama_position * positions, float * keys, float * values, kvp_error * err);

/* A learned policy: a small network for every (layer, KV head), or one for every layer that sees all of its KV
 * heads, whose scores docs/policy-format.md defines. It runs as ggml graphs: on the CPU for rows in host memory,
 * else on the device that holds them. */
typedef struct kvp_policy kvp_policy;

typedef struct kvp_policy_shape {
    uint32_t n_layer; /* L, of the base cache */
    uint32_t n_head_kv; /* H */
    uint32_t head_size_k;
    uint32_t head_size_v;
    uint32_t hidden;  /* h, hidden units */
    uint32_t context; /* w, tokens a score looks at: odd, at most 33; (w - 1) / 2 to either side */
    uint32_t n_networks; /* G, of a layer: H, one for each head, or 1 for all of them */
} kvp_policy_shape;

/* Its weights, f32, as a policy file holds them; they are copied. */
typedef struct kvp_policy_weights {
    kvp_policy_shape shape;
    const float *    key;      /* [L, G, h, H/G * head_size_k]: of the network's heads, head by head */
    const float *    value;    /* [L, G, h, H/G * head_size_v]                                       */
    const float *    position; /* [L, G, h, 4]                                                       */
    const float *    fc1_bias; /* [L, G, h]                                                          */
    const float *    conv;     /* [L, G, w, h]                                                       */
    const float *    fc2;      /* [L, G, h, h]                                                       */
    const float *    fc2_bias; /* [L, G, h]                                                          */
    const float *    out;      /* [L, G, H/G, h]                                                     */
} kvp_policy_weights;

KVP_API int32_t kvp_policy_create(const kvp_policy_weights * weights, kvp_policy ** policy, kvp_error * err);
KVP_API void    kvp_policy_free(kvp_policy * policy); /* NULL is allowed */

/* Scores n tokens that lie in memory.
 *   keys    f32 [n_layer, n_head_kv, n, head_size_k], RoPE included
 *   values  f32 [n_layer, n_head_kv, n, head_size_v]
 *   indices int32 [n], ascending: the tokens' in the conversation. Where one is left out between two, it
 *           counts as missing.
 *   scores  f32 [n_layer, n_head_kv, n]; larger = keep                                              */
KVP_API int32_t kvp_policy_score(kvp_policy * policy, const float * keys, const float * values,
                                 const kvp_token_index * indices, uint32_t n, int32_t n_threads, float * scores,
                                 kvp_error * err);

/* Rules that score the tokens of sequence 0 where their rows lie, so that no key or value is copied out. A larger
 * score means: keep. n is the number of tokens scored; what a rule gives is f32 [n_layer, n_head_kv, n], but for
 * KVP_RULE_LAG. */
enum kvp_rule_kind {
    KVP_RULE_KNORM     = 0, /* -||k||                          (arXiv:2406.11430)                         */
    KVP_RULE_KEYDIFF   = 1, /* -cos(k, mean of k_j / ||k_j||)  (arXiv:2504.15364), j over the n           */
    KVP_RULE_RANGE     = 2, /* largest number of the value minus the smallest (arXiv:2606.03928)          */
    KVP_RULE_LAG       = 3, /* and from here on those with parameters, which the structs below explain    */
    KVP_RULE_ATTENTION = 4,
    KVP_RULE_EXPECTED  = 5,
    KVP_RULE_POLICY    = 6,
};

/* How far keys and values stand out of the ranges of those that follow (arXiv:2504.04704, section 2.2), in the
 * n_parts * lag tokens from number `first` on, in partitions of `lag`. It gives f32 [n_layer, n_head_kv,
 * n_parts - 1, lag], the mean of the keys' and the values' share. */
typedef struct kvp_rule_lag {
    uint32_t first;
    uint32_t lag;
    uint32_t n_parts; /* at least 2 */
} kvp_rule_lag;

/* The attention softmax(scale q.k) that queries (kvp_queries_read) pay to the tokens held, of which each sees its
 * own and those before: summed over queries, averaged over a KV head's query heads. */
typedef struct kvp_rule_attention {
    const float *           queries;       /* [n_layer, n_head, n_queries, head_size_k]                  */
    const kvp_token_index * query_indices; /* [n_queries], below 2^24                                    */
    const float *           scale;         /* [n_layer], what q.k is multiplied by                       */
    const kvp_token_index * key_indices;   /* [n_layer, n_head_kv, n], of the scored tokens              */
    uint32_t                n_head;
    uint32_t                n_queries;
} kvp_rule_attention;

/* What queries are expected to pay that are normal: softmax of scale k.mean + scale^2 k.(covariance)k / 2, averaged
 * over a KV head's query heads, times the norm of the value (arXiv:2510.00636, section 3). */
typedef struct kvp_rule_expected {
    const float *   means;       /* [n_layer, n_head, head_size_k] */
    const float *   covariances; /* [n_layer, n_head, head_size_k, head_size_k] */
    const float *   scale;       /* [n_layer], as above */
    const uint8_t * left_out;    /* [n_layer, n_head_kv, n]: tokens that the softmax leaves out; they score 0 */
    uint32_t        n_head;
} kvp_rule_expected;

/* The score of a learned policy, with as many threads as the context has. */
typedef struct kvp_rule_policy {
    kvp_policy *            policy;
    const kvp_token_index * indices; /* [n], ascending: of the scored tokens */
} kvp_rule_policy;

typedef struct kvp_rule {
    int32_t kind; /* enum kvp_rule_kind: which of these is meant, if any */
    union {
        kvp_rule_lag       lag;
        kvp_rule_attention attention;
        kvp_rule_expected  expected;
        kvp_rule_policy    policy;
    } of;
} kvp_rule;

/* Scores the n tokens of sequence 0 at positions [p0, p1). KVP_NOT_IN_PLACE: it is not known in which cells they
 * lie, or a device lacks an operation or memory; then kvp_cache_read gives the rows. KVP_RULE_KNORM, _KEYDIFF and
 * _POLICY are never refused so: they read rows here. */
KVP_API int32_t kvp_cache_score(kvp_cache * cache, const kvp_rule * rule, kvp_llama_position p0, kvp_llama_position p1,
                                uint32_t n, float * scores, kvp_error * err);

/* Chooses the tokens that stay: all protected ones, then the best by score, until `budget` are kept.
 * A token's score is the mean over all heads of its z-scores, each head standardised over the tokens
 * that compete. Tokens with one unit number stay or go together, and are protected together; more
 * than `budget` stay only when the protected ones alone are more. Equal scores favour newer tokens.
 *   scores        f32 [n_head, n], n_head = n_layer * n_head_kv; larger = keep, not finite = drop
 *   unit          int32 [n], equal numbers side by side
 *   is_protected  uint8 [n]
 *   keep          uint8 [n], result                                                               */
KVP_API int32_t kvp_choose_tokens(const float * scores, uint32_t n_head, const int32_t * unit,
                                  const uint8_t * is_protected, uint32_t n, uint32_t budget, uint8_t * keep,
                                  kvp_error * err);

/* Removes tokens from every layer and head of sequence 0, in the fewest llama_memory_seq_rm calls.
 *   present  int32 [n], ascending: every position the sequence holds now
 *   keep     uint8 [n]: 0 = remove. The newest token must be kept (llama.cpp continues from it).
 *   n_ranges number of calls made (may be NULL)
 * On KVP_ERR_RUNTIME some ranges may be gone: the caller must re-read the conversation.           */
KVP_API int32_t kvp_cache_remove(kvp_cache * cache, const kvp_llama_position * present, const uint8_t * keep,
                                 uint32_t n, uint32_t * n_ranges, kvp_error * err);

/* Gives the cells at positions `present` new, not larger ones; both int32 [n], ascending. llama.cpp turns the
 * keys accordingly when it decodes the next batch (its "K-shift"); until then the cache must not be read. */
KVP_API int32_t kvp_cache_move(kvp_cache * cache, const kvp_llama_position * present,
                               const kvp_llama_position * positions, uint32_t n, kvp_error * err);

/* Chooses the rows that each head keeps, on its own, the same number in all heads.
 *   scores        f32 [n_head, n]; larger = keep, not finite = drop
 *   unit          int32 [n_head, n], ascending; rows with one number stay or go together
 *   is_protected  uint8 [n_head, n]; a unit with a protected row stays
 *   keep          int32 [n_head, n_keep], ascending rows
 * Protected units come first, then whole units by mean score while they fit; equal scores favour the
 * newer row. Only where nothing but units too large for the last rows is left is one of them cut. */
KVP_API int32_t kvp_choose_rows(const float * scores, const int32_t * unit, const uint8_t * is_protected,
                                uint32_t n_head, uint32_t n, uint32_t n_keep, kvp_row * keep, kvp_error * err);

/* Tests on an EMPTY context whether heads can keep different rows, and clears it again: heads must be
 * whole blocks of the cache's types, and next-token logits must not change when the rows of every head
 * are put into another order and far away (they do with ALiBi). KVP_ERR_UNSUPPORTED says why not. */
KVP_API int32_t kvp_cache_check_packing(kvp_cache * cache, kvp_error * err);

/* How kept keys are turned to new RoPE positions: pair p of a key by distance * frequency[p] radians. */
typedef struct kvp_rope_shift {
    const double *            frequency; /* [n_layer, n_pairs], radians per position                  */
    const kvp_rope_position * distance;  /* [n_layer, n_head_kv, n_keep], new position minus old      */
    uint32_t                  n_pairs;
    uint32_t                  neox;      /* 1: pairs (p, p + n_pairs) of a key; 0: pairs (2p, 2p + 1) */
} kvp_rope_shift;

/* Packs sequence 0 into n_keep cells: row i of layer l and KV head h becomes row keep[l, h, i] of now.
 *   present    int32 [n], ascending: every position the sequence holds now
 *   keep       int32 [n_layer, n_head_kv, n_keep]: rows, all different within a head
 *   positions  int32 [n_keep], ascending: the new cells' positions; the last must be present[n - 1],
 *              from which llama.cpp continues, unless keys are turned
 *   shift      NULL, or how keys are turned on the way
 * It is packed where it lies if that is known, the rows of every head ascend, and the positions are all present
 * ones: their cells survive. (In host memory every row must also go to an older row's cell, or every row to a
 * newer one's.) Else it is packed as a state that goes out and back in, as it is where keys are turned, and on
 * a device where heads are no whole 32-bit words. If the positions are the oldest ones present, and then the
 * newest ones, row i lies in cell i either way; but for transposed V on a device and beside a window cache,
 * where the newest tokens stay in the cells they are in.
 * A window cache of a model with sliding-window layers is not packed; in place it loses positions that are out
 * of sight. Its model's keys cannot be turned.
 * On KVP_ERR_ARGUMENT, _UNSUPPORTED, _LAYOUT and _MEMORY the cache is what it was. On KVP_ERR_RUNTIME a device
 * or llama.cpp failed in the middle and the cache is EMPTY: the conversation must be read again. */
KVP_API int32_t kvp_cache_pack(kvp_cache * cache, const kvp_llama_position * present, uint32_t n, const kvp_row * keep,
                               const kvp_llama_position * positions, uint32_t n_keep, const kvp_rope_shift * shift,
                               kvp_error * err);

/* Puts a state blob of sequence 0 back that was taken from a cache of the same layout, after checking it
 * against this one: layers, types, sizes, and that it holds the positions `present` (int32 [n],
 * ascending). Errors as in kvp_cache_pack: only KVP_ERR_RUNTIME leaves the cache changed, and EMPTY. */
KVP_API int32_t kvp_cache_restore(kvp_cache * cache, const uint8_t * blob, size_t size,
                                  const kvp_llama_position * present, uint32_t n, kvp_error * err);

/* The checks of kvp_cache_restore alone: whether it would find what it is told to find. The cache is not read. */
KVP_API int32_t kvp_cache_check_state(const kvp_cache * cache, const uint8_t * blob, size_t size,
                                      const kvp_llama_position * present, uint32_t n, kvp_error * err);

/* The same as kvp_cache_pack on a state blob of sequence seq_id in memory (llama_state_seq_get_data), without any context:
 * the blob is rewritten in place and its new size stored in *packed_size. k_hadamard_block: as in
 * kvp_cache_shape, used only to turn keys.
 * On any error the blob may be spoilt; it is never read or written outside [blob, blob + size). */
KVP_API int32_t kvp_state_pack(uint8_t * blob, size_t size, int32_t seq_id, uint32_t n_layer, uint32_t n_head_kv,
                               const kvp_llama_position * present, uint32_t n, const kvp_row * keep,
                               const kvp_llama_position * positions, uint32_t n_keep, const kvp_rope_shift * shift,
                               uint32_t k_hadamard_block, size_t * packed_size, kvp_error * err);

/* A KV log: rows of tokens that the caller keeps outside the cache, so that they can be asked for and come back into
 * cells. It is a number of blocks, each of consecutive tokens; blocks ascend and need not follow each other without
 * a gap. A block's rows lie in memory that ggml can multiply as it is:
 *     for every layer: K [n, k_row bytes], then V [n, v_row bytes]; nothing in between, V never transposed
 * RoPE stays in the keys, and rows of a Hadamard-rotated cache stay rotated. */
typedef struct kvp_log_layout {
    uint32_t n_layer; /* of the base cache */
    uint32_t n_head_kv;
    uint32_t head_size_k;
    uint32_t head_size_v;
    int32_t  type_k; /* enum ggml_type, of the log's rows; the cache's may be others */
    int32_t  type_v;
    uint32_t k_hadamard_block; /* as in kvp_cache_shape */
    uint32_t v_hadamard_block;
    uint64_t k_row; /* bytes of one token's keys in one layer, all KV heads */
    uint64_t v_row;
    uint64_t bytes_per_token; /* n_layer * (k_row + v_row) */
} kvp_log_layout;

typedef struct kvp_log_block {
    const uint8_t *   rows;       /* n * bytes_per_token bytes                                     */
    kvp_token_index   first;      /* its tokens are first, first + 1, ... of the conversation       */
    uint32_t          n;
    kvp_rope_position rope_first; /* that the first one's keys carry; the others' follow one by one */
} kvp_log_block;

/* The layout of a log of this cache's rows. type: -1 for the cache's own types, then rows are copied bit for bit; or
 * an enum ggml_type of both K and V in the log, then they are converted on the way out and back.
 * KVP_ERR_UNSUPPORTED: heads are not whole blocks of the type, or rows cannot be converted to it and back. */
KVP_API int32_t kvp_cache_log_layout(const kvp_cache * cache, int32_t type, kvp_log_layout * layout, kvp_error * err);

/* Copies the n tokens of sequence 0 at positions [p0, p1) into the memory of a block, in order of their positions.
 *   layout  as kvp_cache_log_layout gives it for this cache, or for one like it
 *   rows    n * bytes_per_token bytes, result
 * Where the cache does not lie in host memory, or it is not known where a token lies, the rows of these tokens go
 * through llama.cpp's state, and with them what a window cache holds of the same tokens. The cache is not changed. */
KVP_API int32_t kvp_cache_log_rows(kvp_cache * cache, const kvp_log_layout * layout, kvp_llama_position p0,
                                   kvp_llama_position p1, uint32_t n, uint8_t * rows, kvp_error * err);

/* Gives sequence 0 new rows, from those that are present and from a log.
 *   present    int32 [n], ascending: every position the sequence holds now; n may be 0
 *   blocks     [n_blocks], ascending, without overlaps; each has at least one token
 *   source     int32 [n_layer, n_head_kv, n_new]: what row i of a layer and KV head becomes: a present row r >= 0, or
 *              -1 - t, the logged row of the conversation's token t. All are different within a head; heads
 *              may take the same ones.
 *   positions  int32 [n_new], ascending: the rows' new positions. The last is the newest, from which llama.cpp continues:
 *              below 2^24, or not above present[n - 1]. n_new is at least 1, and at most the cells there are.
 *   shift      NULL, or how keys of either origin are turned on the way: distance is [n_layer, n_head_kv, n_new]
 * Where the cache lies in known cells of host memory, the positions are the present ones, and no keys are turned, the
 * rows that change are written to their cells. Else a state goes out and a new one back in, and row i then lies in
 * cell i.
 * The window cache of a model with sliding-window layers stays as it is, but for positions behind the newest one,
 * which it loses; a state holds of it what the next token sees. KVP_ERR_UNSUPPORTED: it lacks some of that, as an empty
 * one does, or keys shall be turned.
 * Errors as in kvp_cache_pack: only KVP_ERR_RUNTIME leaves the cache changed, and EMPTY. */
KVP_API int32_t kvp_cache_fill(kvp_cache * cache, const kvp_llama_position * present, uint32_t n,
                               const kvp_log_layout * layout, const kvp_log_block * blocks, uint32_t n_blocks,
                               const int32_t * source, const kvp_llama_position * positions, uint32_t n_new,
                               const kvp_rope_shift * shift, kvp_error * err);

/* Queries that ask a KV log (kvp_queries_read). */
typedef struct kvp_log_queries {
    const float *           queries; /* [n_layer, n_head, n_queries, head_size_k]: after norm and RoPE, without a Hadamard
                                        rotation */
    const kvp_token_index * indices; /* [n_queries], ascending: the tokens' in the conversation */
    const float *           scale;   /* [n_layer], what q.k is multiplied by                    */
    uint32_t                n_head;  /* query head h uses KV head h / (n_head / n_head_kv)      */
    uint32_t                n_queries;
    const double *          turn;      /* [n_blocks]: keys of block b are seen as if they were turned by so many
                                          positions, whole or not; NULL: as they are            */
    const double *          frequency; /* [n_layer, n_pairs], as in kvp_rope_shift; unused without turn */
    uint32_t                n_pairs;
    uint32_t                neox;
} kvp_log_queries;

/* The attention softmax(scale q.k) that queries pay to all tokens of a log, of which each sees its own and those
 * before: one softmax over the tokens of all blocks. It needs no context and no cache.
 *   largest  f32 [n_layer, n_head_kv, N], N the blocks' tokens in their order: the largest attention that any of the
 *            queries of any of the KV head's query heads pays; or NULL
 *   mean     the same of the mean over them; or NULL
 * Tokens that no query sees have 0; a query that sees none pays nothing. A q.k that is no number counts as not seen.
 * Keys are read from where they lie, which may be any address, also in a read-only memory map. They may be of every
 * type that ggml converts to f32, and are multiplied in f32. Memory for each thread: 32 MiB, or 128 bytes for every
 * token where that is more, and a little. */
KVP_API int32_t kvp_log_score(const kvp_log_layout * layout, const kvp_log_block * blocks, uint32_t n_blocks,
                              const kvp_log_queries * queries, int32_t n_threads, float * largest, float * mean,
                              kvp_error * err);

/* Captures the attention that a running context pays, reduced at once: for every token, KV head and
 * block of queries the sum over the block's queries of the LARGEST attention that any query head of the
 * KV head's group pays to the token (arXiv:2602.10238, section 3: the maximum comes before the sum).
 *
 * Flash attention must be off: llama.cpp then computes nodes "kq_soft_max-<layer>", which the context's observer
 * shows. Between begin and end decode ONE sequence from an empty cache, token by token or in batches; outside
 * them the capture asks for nothing. */
typedef struct kvp_capture kvp_capture;

typedef struct kvp_capture_plan {
    uint32_t n_layer;    /* of the base cache (kvp_cache_shape)                                            */
    uint32_t n_head_kv;
    uint32_t n_tokens;   /* most tokens that will be decoded                                               */
    uint32_t block;      /* queries in a block; the last block may have fewer                              */
    uint32_t first;      /* queries in the first block, 1..block: moves the borders                        */
    uint32_t base_cells; /* only layers whose cache has this many cells (0: all layers), which tells those
                            of the base cache from those with a sliding window                             */
    float    scale;      /* sums are multiplied by it before they become f16; block * scale <= 65504       */
} kvp_capture_plan;

KVP_API int32_t kvp_capture_create(kvp_observer * observer, kvp_capture ** capture, kvp_error * err);
KVP_API void    kvp_capture_free(kvp_capture * capture); /* NULL is allowed */
KVP_API int32_t kvp_capture_begin(kvp_capture * capture, const kvp_capture_plan * plan, kvp_error * err);

/* Ends a capture of n_tokens tokens and writes its sums: f16 bits [n_layer, n_head_kv, P]. P holds the
 * blocks one after the other; the block of queries [s, e) has e values, for tokens 0 to e - 1 (no query
 * sees more). So P = sum over blocks of their e, and n_sums must be n_layer * n_head_kv * P.
 * What went wrong while decoding is told here: attention that is no probability, a layer without it. */
KVP_API int32_t kvp_capture_end(kvp_capture * capture, uint32_t n_tokens, uint16_t * sums, uint64_t n_sums,
                                kvp_error * err);

/* Logs the queries of the newest tokens that a running context reads, as its attention sees them: after
 * norm and RoPE, with flash attention or without. They are found at the operation that multiplies them with
 * the cached keys, whatever the model calls them. The log asks the context's observer for nothing until it is
 * started:
 *     1. kvp_queries_try(log, n, err); decode n tokens into the EMPTY context, at positions 0 to n - 1
 *     2. kvp_queries_start with the keys of these n tokens, as kvp_cache_read gives them; clear the context
 * Layers are those of the base cache, found by their keys. KVP_ERR_UNSUPPORTED: a model whose queries are not
 * found, or whose attention is more than softmax(scale * q.k) (bias, soft cap, sinks). */
typedef struct kvp_queries kvp_queries;

typedef struct kvp_queries_shape {
    uint32_t n_layer;
    uint32_t n_head;    /* query heads of a layer; head h uses KV head h / (n_head / n_head_kv)      */
    uint32_t head_size;
    uint32_t k_hadamard_block; /* of the rotation that attention multiplies under (0 = none); it is undone
                                  when queries are read                                               */
} kvp_queries_shape;

KVP_API int32_t kvp_queries_create(kvp_observer * observer, kvp_queries ** log, kvp_error * err);
KVP_API void    kvp_queries_free(kvp_queries * log); /* NULL is allowed */
KVP_API int32_t kvp_queries_try(kvp_queries * log, uint32_t n_tokens, kvp_error * err);

/*   cache     what kvp_cache_get_shape says of the context's cache
 *   keys      f32 [n_layer, n_head_kv, n, head_size_k] of the n tokens tried
 *   capacity  tokens whose queries are kept
 *   shape     result
 *   scales    f32 [n_layer], result: what q.k is multiplied by before the softmax                   */
KVP_API int32_t kvp_queries_start(kvp_queries * log, const kvp_cache_shape * cache, const float * keys,
                                  uint32_t capacity, kvp_queries_shape * shape, float * scales, kvp_error * err);

/* The n tokens decoded since the last call are number first, first + 1, ... of the conversation. On an error
 * none of them is logged. */
KVP_API int32_t kvp_queries_append(kvp_queries * log, kvp_token_index first, uint32_t n, kvp_error * err);

/* Looks away (0) or on (1) from the next decode on; a log that was started looks on. Watching makes llama.cpp compute
 * layer by layer. Tokens decoded meanwhile are not appended, so what the log holds may have gaps. */
KVP_API int32_t kvp_queries_watch(kvp_queries * log, int32_t on, kvp_error * err);

/* Forgets the tokens from number `length` on, and whatever was decoded but not appended. */
KVP_API int32_t kvp_queries_rewind(kvp_queries * log, kvp_token_index length, kvp_error * err);

/* Tokens whose queries there are: at most `capacity`. */
KVP_API uint32_t kvp_queries_size(const kvp_queries * log);

/* The newest n of them.
 *   queries    f32 [n_layer, n_head, n, head_size]
 *   indices    int32 [n], ascending: in the conversation */
KVP_API int32_t kvp_queries_read(const kvp_queries * log, uint32_t n, float * queries, kvp_token_index * indices,
                                 kvp_error * err);

#ifdef __cplusplus
}
#endif

#endif /* KVP_EDGE_H */

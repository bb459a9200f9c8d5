"""FlashAttention and FlashAttention-2: what they move, and the records of both papers.

"FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", Dao, Fu, Ermon,
Rudra, Ré 2022, arXiv 2205.14135. "FlashAttention-2: Faster Attention with Better Parallelism and
Work Partitioning", Dao 2023, arXiv 2307.08691.

Attention is computed by blocks of keys that pass through fast memory. With the scores S_j = q K_j^T
of block j, for each query a maximum m, a sum l and an output O that is divided once at the end:

    m' = max(m, max S_j);   P_j = exp(S_j - m')
    l' = exp(m - m') l + sum P_j;   O' = exp(m - m') O + P_j V_j
    out = O / l;   L = m + log l

The first paper keeps O divided at every block and saves m and l; the second saves L alone. Backward
computes P = exp(S - L) again, block by block, and with D = rowsum(dO * O)

    dV = P^T dO;   dS = P * (dO V^T - D);   dQ = dS K;   dK = dS^T Q

A mask of live blocks leaves the others out: block-sparse FlashAttention.

It is how this project computes softmax attention: the mixer `attention` calls
`pallas_kernels.attention`, whose kernels are in `pallas_kernels/attention/` (tpu_forward.py and
gpu_forward.py for the recurrence above, tpu_backward.py and gpu_backward.py, blockwise.py where
there is no kernel). `kernel="reference"` on that mixer is standard attention, with S and P in
memory. The mixer `block_sparse_attention` takes a fixed pattern of blocks.
"""

from efficient.papers import Claim, Paper

_FIRST = "tests/papers/test_flash_attention.py"
_SECOND = "tests/papers/test_flash_attention_2.py"

PAPERS = (
    Paper(
        slug="flash_attention",
        status="equations",
        claims=(
            Claim("attention by blocks is exact", f"{_FIRST}::test_blocks_are_exact", True),
            Claim(
                "additional memory is linear in the length, and backward saves no T x T array",
                f"{_FIRST}::test_what_backward_keeps_is_linear_in_length",
                True,
            ),
            Claim(
                "fewer HBM accesses than standard attention",
                f"{_FIRST}::test_hbm_bytes_against_standard_attention",
                True,
                "counted, programs compiled for v5e, 8,192 tokens in sequences of 1,024 to 8,192, 8"
                " heads of 128, XLA's copies around the kernels included: 6 to 24 times fewer"
                " forward, 8 to 22 times with gradients; the test prints the table",
            ),
            Claim(
                "HBM accesses are O(T^2 H^2 / M) for fast memory of M",
                f"{_FIRST}::test_hbm_bytes_are_those_of_the_theorem",
                True,
                "the TPU kernel's bytes at two lengths and 128, 256 and 512 rows of queries held,"
                " which are M / H; that no algorithm does better is not shown",
            ),
            Claim(
                "block-sparse FlashAttention does work in proportion to the live blocks",
                f"{_FIRST}::test_block_sparse_work_is_that_of_live_blocks",
                True,
                "the Hopper kernel's list; the TPU's steps, and the bytes they read, go by 2,048"
                " keys that hold a live block",
            ),
            Claim(
                "trains BERT-large 15% and GPT-2 up to 3 times faster than the state of 2022",
                note="needs a GPU; here only the loss is shown to be the same",
            ),
            Claim(
                "longer context gives better models: 0.7 of perplexity on GPT-2, 6.4 points on long"
                " documents",
                note="needs OpenWebText, MIMIC-III and days of GPUs",
            ),
            Claim("Path-X 61.4% and Path-256 63.1%", note="needs days of GPUs"),
        ),
        source="the abstract, and the authors' flash_attn/flash_attn_triton.py of"
        " github.com/Dao-AILab/flash-attention for the recurrence and the backward pass; the paper"
        " itself was not at hand, its theorem is as others cite it",
        departures=(
            "O is divided at the end and L alone is saved, as in FlashAttention-2",
            "on TPU a value sampled from the first keys stands in for the running maximum"
            " (tpu_forward.py says how it stays exact)",
        ),
    ),
    Paper(
        slug="flash_attention_2",
        status="equations",
        claims=(
            Claim(
                "both passes need no more than the log-sum-exp of each row beside the output",
                f"{_SECOND}::test_both_passes_against_the_algorithm",
                True,
                "values, and what the backward pass keeps",
            ),
            Claim(
                "dividing the output once, at the end, saves work beside the products",
                note="the kernels do so; what it saves was not measured",
            ),
            Claim(
                "parallel over the length: a thread block for each tile of queries of each head",
                f"{_SECOND}::test_one_item_of_work_for_each_tile",
                True,
                "the Hopper kernel's list of work; it is compiled and interpreted, not yet run",
            ),
            Claim(
                "causal masking skips the blocks above the diagonal, about half of them",
                f"{_SECOND}::test_causal_skips_half",
                True,
            ),
            Claim(
                "multi-query and grouped-query attention without copies of keys",
                f"{_SECOND}::test_grouped_queries_read_each_key_once_a_tile",
                True,
            ),
            Claim("2 times FlashAttention, 50-73% of an A100's peak", note="needs a GPU"),
            Claim("225 TFLOP/s an A100 in training, 72% utilisation", note="needs GPUs"),
        ),
        source="the abstract, and the authors' flash_attn/flash_attn_triton.py, which divides once"
        " and saves the log-sum-exp; the paper itself was not at hand",
        departures=("dQ is never added up by atomics: every gradient is deterministic",),
    ),
)


def standard_elements(length: int, head_size: int) -> int:
    """HBM accesses of standard attention forward, a head: O(T H + T^2), counted.

    q, k and v read and the output written; S written and read, P written and read.
    """
    return 4 * length * head_size + 4 * length**2


def flash_elements(length: int, head_size: int, rows: int, live: float = 1.0) -> float:
    """HBM accesses of FlashAttention forward, a head, with `rows` queries held in fast memory.

    q, the output and L once; k and v once for every `rows` queries: 2 T^2 H / rows, which is the
    theorem's T^2 H^2 / M where rows is M / H.

    Args:
      live: fraction of the blocks that a mask leaves.
    """
    return 2 * length * head_size + length + 2 * length**2 * head_size / rows * live

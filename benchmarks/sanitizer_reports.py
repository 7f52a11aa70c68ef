"""Reports of compute-sanitizer on these kernels that are no fault, each with the reason why.

`what` is found in the report's first line. `places`: patterns for the accesses that it names, "Write access at FUNCTION(..) in
FILE"; each access must match one of them, and each pattern must be met. Functions and files, no line numbers: these change.
"""
import re
from typing import NamedTuple


class Known(NamedTuple):
    tool: str
    rows: str
    what: str
    places: tuple
    why: str


FORWARD = r"fwd_sm90_.*_(plain|tall|short|dropout)|rows_any"      # the last one merges what some of these made
RACE = r"^(Error|Warning): Race reported between"
TWO_GROUPS = r"wide_shared<\(int\)\d+, \(int\)2,"          # of decode_wide.cu, whose warpgroups share query rows
OF_DROPOUT = r"bwd_kernel<\(bool\)1, \(score_kind\)5>"       # bwd.cu's DROPOUT

KNOWN = (
    Known("racecheck", FORWARD, RACE,
          (r"Write .*\bdescribe_rows[<(]", r"Read .*\b(consume<|add_seen_poison<)"),
          "The masker's lanes write rows and blocks, meet at __syncwarp, and its lane 0 arrives at the mbarrier q_full, for "
          "whose phase consumers wait before they read. Before the next write: a consumer warp reads, meets at __syncwarp, "
          "its lane 0 arrives at q_empty (in the careful pass behind add_seen_poison()), for which the masker waits; where each "
          "tile has a place for its rows, at o_full; collector, tile_empty, scheduler, tile_full, masker. The tool follows an "
          "mbarrier for the thread that arrives, not for those which that thread has met before."),
    Known("racecheck", FORWARD, RACE, (r"Write .*\b(describe_rows[<(]|place_tile\()", r"Read .*\bfinish_rows<"),
          "A lane of the masker writes into tiles[t] where its O and LSE go, the warp meets at __syncwarp, lane 0 arrives at "
          "q_full, for which consumers wait. Before the next write their lanes meet at __syncwarp behind the read, lane 0 "
          "arrives at o_full; collector, tile_empty, scheduler, tile_full, masker. The same limit of the tool."),
    Known("racecheck", FORWARD, RACE,
          (r"Write .*\b(describe_tile|schedule)<",
           r"Read .*\b(consume<|finish_rows<|add_seen_poison<|find_rows\(|produce\(|describe_rows[<(])"),
          "The scheduler's lane 0 writes tiles[t] and arrives at tile_full and q_full itself, for which the others wait. "
          "Before the next write the lanes of a consumer warp meet at __syncwarp behind their last read, lane 0 arrives at "
          "o_full, the collector waits for it and arrives at tile_empty, for which the scheduler waits; lanes of the masker and "
          "of the producer meet at __syncwarp behind theirs, before lane 0 arrives at q_full and before the copies leave for "
          "which those consumers wait. The same limit of the tool."),
    Known("racecheck", FORWARD, RACE, (r"Write .*\bfinish_rows<", r"(Read|Write) .*\bcollect[<(]"),
          "Lanes of a consumer warp set poisoned[s], all to 1, meet at __syncwarp, lane 0 arrives at o_full; the collector "
          "waits for it, reads, sets 0 and arrives at tile_empty, behind which the scheduler, q_full and the consumers follow."
          " The same limit."),
    Known("racecheck", FORWARD, RACE, (r"Read .*\bclean_v<", r"Write .*\bclean_v<"),
          "Consumer warpgroups clean the same V buffer, each all of it before its own product. A word that is written "
          "becomes what every other warpgroup makes of it, too: whether it is read before or after, the result is the same "
          "word."),
    Known("racecheck", "fwd_sm90_.*_d256_.*_plain", RACE,
          (r"Read .*\b(advance_pair|load_cluster_relaxed)\(", r"Write .*\bstore_cluster_relaxed\("),
          "Two blocks of a cluster pass one word to and fro, a thread of each, by loads and stores of PTX that are relaxed and "
          "of cluster scope, which do not race by its memory model. One waits for 0 and stores an item, the other waits for an "
          "item and stores 0; nothing else is ordered by it. The tool takes them for plain accesses."),
    Known("racecheck", "fwd_sm90_.*_decodewide", RACE, (r"Write .*\bcp_async_16\(", r"Write .*\bstore_cluster\("),
          "A block's threads copy Q, wait for their copies, meet, go through its tiles and arrive at the cluster's barrier. The "
          "other block of the cluster waits there before it stores its sums into the place of Q; a block of these clusters has "
          "one segment, so no Q follows. The tool does not follow cluster barriers to another block's stores."),
    Known("racecheck", "fwd_sm90_.*_decodewide", RACE,
          (rf"Write .*\b((share_sums|finish_segment)<{TWO_GROUPS}|decode_wide_kernel<{TWO_GROUPS}.* in dec_wide_end\.cuh)",
           r"Read .*\b(dec_actor::read<|decode_wide_kernel<.* in dec_combine\.cuh)"),
          "At the end of a segment the warps of both groups write maxima, sums and outputs, meet at a named barrier of all 256 "
          "consumers and read what the other group wrote; they meet again before the next write. Named now and then, of one pair "
          "of warps of a block. A build that counted each warp before that barrier and looked at all eight counts behind it "
          "found none missing in launches that the tool named (LOG.md). Some accesses are named without their function, as the "
          "kernel's own."),
    Known("racecheck", "fwd_sm90_.*_decodewide", RACE,
          (rf"Write .*\bdecode_wide_kernel<{TWO_GROUPS}.* in dec_combine\.cuh", r"Read .*\bcombine_items<"),
          "Many parts of a pair: warps write their sums into scratch, meet at a named barrier of all warps that merge it and "
          "read those of the others; before the next write they meet again, or the block is at its end. The kernels for fewer "
          "rows, which go through the same code, are not named: the limit of the entry above, in the same kernels. A build that "
          "counted each warp before that barrier found none missing behind it, in launches that the tool named (LOG.md)."),
    Known("racecheck", "bwd_sm90_.*_plain", RACE,
          (r"Write .*\bbulk_load\(", rf"Read .*\b(load_stats\(|step<|consume_as<|begin_step<|{OF_DROPOUT})"),
          "Bulk copies write lse2 and delta of a stage and complete on q_full and dout_full, for which consumers wait. "
          "Before the next copy: all their reads lie before a product of all four warps, behind which one thread of each "
          "consumer arrives at dout_empty and q_empty; the producer waits for both. The same limit of the tool. Of the "
          "kernel for dropout, loads at the head of step() are named without their line, as the kernel's own."),
    Known("racecheck", "bwd_sm90_.*_plain", RACE,
          (r"Write .*\b(produce<|bwd_kernel<.* in .*bwd_tasks\.cuh)",
           rf"Read .*\b((begin_step|take_steps|step|first_bits_of_mask|leave_bias)<|alibi_of_lane\b|{OF_DROPOUT})"),
          "The producer's thread writes about[s], with ALiBi alibi[s], with a mask or dropout heads[s], with a bias bias_at[s], "
          "and arrives at q_full. Before the next write: the reads lie before a product of all four warps, behind which one "
          "thread of each consumer arrives at q_empty, for which the producer waits. The same limit."),
    Known("racecheck", "bwd_sm90_.*_plain", RACE, (r"Write .*\bbulk_load\(", r"Read .*\b(add_scores<|consume_dbias\()"),
          "The kernel for the gradient of a shared or float32 bias: bulk copies write lse2 and delta of a stage and complete on "
          "q_full and dout_full, for which consumers wait. Before the next copy the lanes of a warp meet at __syncwarp behind "
          "their reads, lane 0 arrives at rows_empty (d 256: s_empty, dp_empty), for which the producer waits. The same limit."),
    Known("racecheck", "bwd_sm90_.*_plain", RACE, (r"Write .*\bproduce_dbias\b", r"Read .*\b(consume_dbias|alibi_of_lane)\b"),
          "There, too, the producer's thread writes about[s] and alibi[s] and arrives at k_full, for which consumers wait. Before"
          " the next write the lanes of a warp meet at __syncwarp behind their reads, lane 0 arrives at kv_empty (d 256: s_empty)"
          ", for which it waits. The same limit."),
    Known("racecheck", "bwd_sm90_.*_plain", RACE, (r"Read .*\bkeys_poisoned\(", r"Write .*\bkeys_poisoned\("),
          "Beside a bias consumers ask twice, of K and of V. Thread 0 sets the word to 0 for V while others may still read it "
          "for K: 0, too, for where it is 1 all of them meet in clean_keys() first, thread 0 among them. It becomes 1 only "
          "behind the next barrier of all."),
    Known("racecheck", "bwd_sm90_.*_d256_.*_plain", RACE, (r"Write .*\bconsume_as<", r"Read .*\bconsume_as<"),
          "One consumer writes P into weights[s], each of its warps meets at __syncwarp and lane 0 arrives at weights_full[s], "
          "for which the other waits before it reads; that one's warps arrive the same way at weights_empty[s], for which the "
          "first waits before it writes again. The same limit."),
    Known("racecheck", "bwd_sm90_.*_d256_.*_plain", RACE, (r"Write .*\bproduce_keys<", r"Read .*\bconsume_keys<"),
          "The producer's thread writes poisoned[s] and arrives at k_full, for which consumers wait. It writes again only when "
          "it has waited for k_empty[s], at which one thread of each consumer arrives once the last product of the step is done: "
          "an operation of all four warps, each of which issues it behind its read. The same limit."),
    Known("initcheck", "bwd_sm80_.*_general", r"^Uninitialized __global__ memory read",
          (r"\b(load_relaxed|red_add)_f32x4\(", r"\badd_dq\(", r"\bgradient_tiles\(", r"\bfgqa_bwd_sm80_\w+_general_kernel\b"),
          "The first key tile in a query tile's order stores all of its dQ sums (add_dq, rank 0) and passes the turn on "
          "behind a barrier by a release; the others read and add, each thread to what the same thread of that block stored, "
          "after they have acquired the turn. The tool's own record of that store may come later than the store. With a workspace"
          " full of NaN the results are the same bits (test_results_do_not_depend_on_what_memory_held)."),
)


def accesses_of(report):
    """The places a report names, the one in its first line included."""
    return [*re.findall(r"between ((?:Read|Write) access .*)", report[0]), *report[1:]]


def explains(tool, row, report):
    """Whether an entry explains the report, [first line, place, ..]."""
    for known in KNOWN:
        if known.tool != tool or not re.search(known.rows, row) or not re.search(known.what, report[0]):
            continue
        met = [{n for n, place in enumerate(known.places) if re.search(place, access)} for access in accesses_of(report)]
        if met and all(met) and set().union(*met) == set(range(len(known.places))):
            return True
    return False

// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * The operations layer: what every VMA-shaping call did to an address space, seen from tracepoints alone.
 *
 * The VMAs around a range are read by walking the maple tree inside the kernel's own mmap write lock, so no
 * other thread can be in the way. All of one write section is gathered in its address space's `space` and leaves
 * as one ring-buffer record made of 64-byte cells; schema.py documents the cells.
 *
 * Constants come from vmatrace_kernel.h (offsets from BTF, text ranges from kallsyms) and vmatrace_events.h
 * (generated from schema.py). Nothing here knows a kernel version.
 */
#include "vmatrace_kernel.h"
#include "vmatrace_events.h"
#include "vma_compat.h"

#define BPF_LICENSE	Dual MIT/GPL

#define CELL_MAX	56	/* cells gathered before a partial record leaves */
#define WALK_STEPS	24	/* slots or levels per program run; the walker calls itself again for more */
#define NODE_MASK	(~0xffULL)
#define ADDR_END	(~0ULL)
#define NO_WAKEUP	1
#define NEW_FILES	4
#define MAP_ANONYMOUS	0x20
#define CAP_IPC_LOCK	14

/* total_vm to brk lie close together in every mm_struct: one read, then words of it */
#define MM_WORD(field)	((OFF_mm_##field - OFF_mm_total_vm) / 8)
#define MM_READ_SIZE	(OFF_mm_brk - OFF_mm_total_vm + 8)

/* One program per raw tracepoint; bcc must not attach them by itself, so not its RAW_TRACEPOINT_PROBE. */
#define HOOK(tracepoint) int on_##tracepoint(struct bpf_raw_tracepoint_args *ctx)

struct space {
	u32 id, seq;
	u32 open_tid;		/* the task inside the write section; 0: none */
	u8 downgraded, finished, dirty, dead;
	u8 op_class, abi, role, cover_flags;
	u16 nr, n;		/* n: cells used */
	u32 evidence;		/* events in this section; odd: the last cell has room for one more */
	u64 range[6];		/* three of [from, to); bcc takes one-dimensional arrays only */
	u32 ranges, current_range;
	u32 rows, kind, bits;
	u32 part, broken;	/* of this section: records made so far; whether one of them was lost */
	u64 store_lo, store_hi;
	u64 acquired, arg;
	u64 decisions;		/* calls of probed functions so far */
	u64 walk_node, walk_min, walk_max, walk_addr, cover_lo;
	u32 slot, in_leaf;
	u64 root_at;
	u32 new_files, done;
	u64 new_file[NEW_FILES];
	u64 mm_words[MM_READ_SIZE / 8];
	u64 node[32];
	u64 vma[32];
	u64 cells[65 * 8];
};

BPF_RINGBUF_OUTPUT(ring, RING_PAGES);
BPF_TABLE("hash", u64, struct space, spaces, MAX_SPACES);
BPF_ARRAY(blank_space, struct space, 1);
BPF_HASH(traced_tgids, u32, u32, 65536);
BPF_ARRAY(op_classes, u16, 1024);
BPF_ARRAY(settings, u64, 8);
BPF_PERCPU_ARRAY(counts, u64, COUNT_MAX);
BPF_ARRAY(next_space, u64, 1);
BPF_ARRAY(store_fn, u64, 1);
BPF_ARRAY(vma_cache, u64, 1);
BPF_TABLE("lru_hash", u64, u64, files_seen, 16384);
BPF_PERCPU_ARRAY(file_buf, struct file_record, 1);
BPF_PROG_ARRAY(walker, 2);
BPF_HASH(foreign_mm, u32, u64, 1024);	/* task -> the mm of another process whose write lock it holds */
BPF_ARRAY(foreign_open, u64, 1);	/* how many there are: mostly none, and nobody needs to look */

static __always_inline u64 bump(int which)
{
	u64 *count = counts.lookup(&which);

	return count ? ++*count : 0;
}

static __always_inline u64 setting(int which)
{
	u64 *value = settings.lookup(&which);

	return value ? *value : 0;
}

static __always_inline u64 read_word(u64 address)
{
	u64 value = 0;

	bpf_probe_read_kernel(&value, 8, (void *)address);
	return value;
}

static __always_inline u32 read_half(u64 address)
{
	u32 value = 0;

	bpf_probe_read_kernel(&value, 4, (void *)address);
	return value;
}

/* A plain load from the typed task pointer, which the verifier allows; bcc would turn it into a helper call. */
static __always_inline u64 current_mm(void)
{
	u64 task = (u64)bpf_get_current_task_btf(), mm;

	asm volatile("%0 = *(u64 *)(%1 + %2)" : "=r"(mm) : "r"(task), "i"(OFF_task_mm));
	return mm;
}

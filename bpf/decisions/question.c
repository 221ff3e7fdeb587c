// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * The decisions layer: what a function of the kernel was asked, the VMAs it looked at, and what it answered.
 *
 * Two programs, one for the call and one for the return, are compiled once and loaded for each probed function. What
 * differs between functions are numbers - which argument is what - that the loader writes into the instructions that
 * PARAMETER() leaves (vmatrace/capture/parameters.py); the verifier then drops what a function does not need.
 *
 * Read after the operations layer, whose maps and helpers it shares. Nothing is recorded outside its address spaces.
 */
#include "vmatrace_decisions.h"

#define PARAMETER(name) ({								\
	u64 value_;									\
	asm volatile("%0 = %1" : "=r"(value_) : "i"(PARAMETER_BASE + PARAMETER_##name));	\
	value_; })
#define NO_ARGUMENT	15	/* stays 0 */
#define ARGUMENTS	16
#define ARGUMENT(name)	args[PARAMETER(name) & 15]
#define ROLE_END	7

struct decision {
	u64 mm, entered, what;
	u64 merge_at, desc_at, result_at;
	u32 n, order, bits, row_bits;
	u64 vma_of[8];		/* by role, at the call */
	u64 anon_pgoff[8];	/* by role; 0: of the proposal */
	u64 scratch[32];	/* what is read at the moment: a merge struct, a tree's node, a VMA */
	u64 cells[17 * 8];
};

BPF_TABLE("hash", u64, struct decision, pending, 1024);
BPF_ARRAY(blank_decision, struct decision, 1);

static __always_inline u64 pending_key(void)
{
	return (u32)bpf_get_current_pid_tgid() | PARAMETER(PROBE) << 32;
}

static __always_inline u64 *decision_cell(struct decision *d, u64 tag)
{
	u64 *cell = &d->cells[(d->n & 15) * 8];

	cell[0] = tag;
	d->n++;
	return cell;
}

/* uffd, policy and name, told apart from the rest because few have them. */
static __always_inline void add_aside(struct decision *d, u64 tag, u64 uffd, u64 policy, u64 name)
{
	u64 *cell = decision_cell(d, tag);

	cell[1] = uffd;
	cell[2] = policy_content(policy);
	cell[3] = 0;
	cell[4] = 0;
	cell[5] = 0;
	cell[6] = 0;
	cell[7] = 0;
	if (name)
		bpf_probe_read_kernel_str(&cell[3], 40, (void *)(name + OFF_anon_name_name));
}

static __always_inline void add_neighbour(struct decision *d, u64 role, u64 vma)
{
	u64 *v = d->scratch, *cell, ops;

	if (bpf_probe_read_kernel(v, VMA_READ_SIZE, (void *)vma)) {
		d->bits |= PROPOSAL_UNREADABLE;
		return;
	}
	d->row_bits = 0;
	if (v[OFF_vma_anon_vma_chain / 8] ^ v[OFF_vma_anon_vma_chain / 8 + 1])
		d->row_bits |= ROW_FORKED;
	ops = v[OFF_vma_vm_ops / 8];
	if (!ops)
		d->row_bits |= ROW_ANONYMOUS;
	else if (read_word(ops + OFF_vm_ops_close))
		d->row_bits |= ROW_CLOSE;
	if (VMA_WORD_POLICY(v) | VMA_WORD_UFFD(v) | VMA_WORD_NAME(v))
		d->row_bits |= ROW_EXTRA;
	cell = decision_cell(d, CELL_NEIGHBOUR | role << 8 | (u64)d->row_bits << 32);
	cell[1] = v[OFF_vma_vm_start / 8];
	cell[2] = v[OFF_vma_vm_end / 8];
	cell[3] = v[OFF_vma_vm_flags / 8];
	cell[4] = v[OFF_vma_vm_pgoff / 8];
	cell[5] = vma;
	cell[6] = v[OFF_vma_anon_vma / 8];
	cell[7] = v[OFF_vma_vm_file / 8];
#ifdef OFF_vma_anon_pgoff_lo
	d->anon_pgoff[role & 7] = ((u32 *)v)[OFF_vma_anon_pgoff_lo / 4] | (u64)((u32 *)v)[OFF_vma_anon_pgoff_hi / 4] << 32;
#endif
	if (d->row_bits & ROW_EXTRA)
		add_aside(d, CELL_EXTRA, VMA_WORD_UFFD(v), VMA_WORD_POLICY(v), VMA_WORD_NAME(v));
}

#ifdef OFF_desc_start
static __always_inline void add_descriptor(struct decision *d, u64 after)
{
	u64 *cell, at = d->desc_at;

	cell = decision_cell(d, CELL_DESCRIPTOR | after << 8);
	cell[1] = read_word(at + OFF_desc_start);
	cell[2] = read_word(at + OFF_desc_end);
	cell[3] = read_word(at + OFF_desc_pgoff);
	cell[4] = read_word(at + OFF_desc_flags);
	cell[5] = read_word(at + OFF_desc_vm_ops);
	cell[6] = read_word(at + OFF_desc_private_data);
	cell[7] = read_word(at + OFF_desc_vm_file);
#ifdef OFF_desc_action
	cell[0] |= (u64)(read_half(at + OFF_desc_action) & 0xff) << 16;
#endif
}
#else
#define add_descriptor(d, after)
#endif

/* The VMA that holds an address, 0 in a gap: neighbours that a merge looks up itself. */
static __always_inline u64 vma_at(struct decision *d, u64 addr)
{
	u64 *v = d->scratch, node, t, wide, i;
	u32 type, base;

	node = read_word(d->mm + OFF_mm_ma_root);
	if ((node & 3) != 2)
		return 0;
#pragma clang loop unroll(disable)
	for (int level = 0; level < 8; level++) {
		if (bpf_probe_read_kernel(v, 256, (void *)(node & NODE_MASK)))
			return 0;
		type = node >> 3 & 15;
		wide = ((type ^ MAPLE_ARANGE) + 1) >> 1;
		i = 0;
		COUNT_PIVOT(0) COUNT_PIVOT(1) COUNT_PIVOT(2) COUNT_PIVOT(3) COUNT_PIVOT(4)
		COUNT_PIVOT(5) COUNT_PIVOT(6) COUNT_PIVOT(7) COUNT_PIVOT(8) COUNT_PIVOT(9)
		COUNT_PIVOT(10) COUNT_PIVOT(11) COUNT_PIVOT(12) COUNT_PIVOT(13) COUNT_PIVOT(14)
		base = OFF_arange64_slot / 8 + wide * ((OFF_range64_slot - OFF_arange64_slot) / 8);
		node = v[hidden(base + i) & 31];
		if (type == MAPLE_LEAF)
			return node;
		if (!(node & NODE_MASK))
			return 0;
	}
	return 0;
}

#ifdef OFF_vmg_start
#define VMG(field)	d->scratch[OFF_vmg_##field / 8]

/* All that a struct vma_merge_struct says: it is rewritten before the function returns. */
static __always_inline void propose_merge(struct decision *d, u64 *cell, u64 vmg)
{
	d->merge_at = vmg;
	if (bpf_probe_read_kernel(d->scratch, VMG_READ_SIZE, (void *)vmg))
		d->bits |= PROPOSAL_UNREADABLE;
	cell[1] = VMG(start);
	cell[2] = VMG(end);
	cell[3] = VMG(flags);
	cell[4] = VMG(pgoff);
	cell[5] = VMG(file);
	cell[6] = VMG(anon_vma);
	cell[7] = 0;
	d->bits |= VMG_BITS(d->scratch);
	d->vma_of[ROLE_PREV] = VMG(prev);
	d->vma_of[ROLE_MIDDLE] = VMG(middle);
	d->vma_of[ROLE_NEXT] = VMG(next);
#ifdef OFF_vmg_copied_from
	d->vma_of[ROLE_COPIED_FROM] = VMG(copied_from);
#endif
#ifdef OFF_vmg_anon_pgoff
	d->anon_pgoff[0] = VMG(anon_pgoff);
#endif
	if (VMG(uffd_ctx) | VMG(policy) | VMG(anon_name))
		add_aside(d, CELL_ASIDE, VMG(uffd_ctx), VMG(policy), VMG(anon_name));
	/* Of a changed range that ends with its VMA, the next one is looked up later. */
	if (PARAMETER(WHAT) == DECISION_MERGE_EXISTING && !d->vma_of[ROLE_NEXT] &&
	    read_word(d->vma_of[ROLE_MIDDLE] + OFF_vma_vm_end) == cell[2])
		d->vma_of[ROLE_NEXT] = vma_at(d, cell[2]);
}
#else
#define propose_merge(d, cell, vmg)
#endif

/* A merge by arguments: what holds the first byte and the byte behind, and whether the range is mapped at all. */
static __always_inline void find_old_neighbours(struct decision *d, u64 start, u64 end)
{
#ifndef OFF_vmg_start
	d->vma_of[ROLE_MIDDLE] = vma_at(d, start);
	d->vma_of[ROLE_NEXT] = vma_at(d, end);
	d->what = d->vma_of[ROLE_MIDDLE] ? DECISION_MERGE_EXISTING : DECISION_MERGE_NEW;
#endif
}

/* What the arguments themselves say. */
static __always_inline void propose(struct decision *d, u64 *cell, u64 *args)
{
	cell[1] = ARGUMENT(START);
	cell[2] = ARGUMENT(END);
	if (PARAMETER(LENGTH) != NO_ARGUMENT)
		cell[2] = cell[1] + ARGUMENT(LENGTH);
	cell[3] = ARGUMENT(FLAGS);
	cell[4] = ARGUMENT(PGOFF);
	cell[5] = ARGUMENT(FILE);
	cell[6] = ARGUMENT(ANON_VMA);
	cell[7] = ARGUMENT(DELTA);
	d->anon_pgoff[0] = ARGUMENT(ANON_PGOFF);
	if (ARGUMENT(NEW_BELOW) & 0xff)
		d->bits |= PROPOSAL_NEW_BELOW;
	if (ARGUMENT(KEEP_SOURCE) & 0xff)
		d->bits |= PROPOSAL_KEEP_SOURCE;
	d->vma_of[ROLE_PREV] = ARGUMENT(PREV);
	d->vma_of[ROLE_SOURCE] = ARGUMENT(SOURCE);
	if (PARAMETER(SOURCE_BEHIND))
		d->vma_of[ROLE_SOURCE] = read_word(d->vma_of[ROLE_SOURCE]);
	d->result_at = ARGUMENT(RESULT);
	if (ARGUMENT(UFFD) | ARGUMENT(POLICY) | ARGUMENT(NAME))
		add_aside(d, CELL_ASIDE, ARGUMENT(UFFD), ARGUMENT(POLICY), ARGUMENT(NAME));
	if (PARAMETER(OLD_MERGE))
		find_old_neighbours(d, cell[1], cell[2]);
}

static __always_inline void propose_unmap(struct decision *d, u64 *cell, u64 vms)
{
#ifdef OFF_vms_start
	cell[1] = read_word(vms + OFF_vms_start);
	cell[2] = read_word(vms + OFF_vms_end);
	if (PARAMETER(WHAT) == DECISION_UNMAP_GATHER)
		d->vma_of[ROLE_SOURCE] = read_word(vms + OFF_vms_vma);
	else
		cell[7] = read_half(vms + OFF_vms_vma_count);
#endif
}

/* A file that is to be mapped is described before: the VMA may come to hold another, behind a stacked one. */
static __always_inline void describe_given_file(struct decision *d, u64 *args)
{
	u64 file = 0;

	if (PARAMETER(WHAT) == DECISION_MMAP || PARAMETER(WHAT) == DECISION_COMPAT_MMAP)
		file = ARGUMENT(FILE);
#ifdef OFF_desc_vm_file
	else if (PARAMETER(DESCRIPTOR) != NO_ARGUMENT)
		file = read_word(d->desc_at + OFF_desc_vm_file);
#endif
	if (file && !seen_before(file))
		describe_file(file);
}

static __always_inline u64 asked_mm(u64 *args)
{
	u64 mm;

	if (PARAMETER(MM) == NO_ARGUMENT)
		return current_mm();
	mm = ARGUMENT(MM);
	if (PARAMETER(MM_BEHIND))
		mm = read_word(mm + PARAMETER(MM_OFFSET));
	return mm;
}

/* An image that exec is building belongs to no known address space yet: its task is known. */
static __always_inline int builds_image(void)
{
	u32 tgid = bpf_get_current_pid_tgid() >> 32;

	if (PARAMETER(WHAT) != DECISION_EXEC_STACK && PARAMETER(WHAT) != DECISION_RELOCATE)
		return 0;
	return traced_tgids.lookup(&tgid) || setting(SETTING_ALL);
}

static __always_inline struct decision *new_decision(u64 key)
{
	struct decision *blank;
	int zero = 0;

	blank = blank_decision.lookup(&zero);
	if (!blank)
		return 0;
	if (pending.update(&key, blank)) {
		bump(COUNT_RECORDS);
		bump(COUNT_LOST);
		return 0;
	}
	return pending.lookup(&key);
}

static __always_inline int called(u64 *args)
{
	u64 mm = asked_mm(args), *cell;
	struct decision *d;
	struct space *s;

	s = spaces.lookup(&mm);
	if (s ? s->dead : !builds_image())
		return 0;
	d = new_decision(pending_key());
	if (!d)
		return 0;
	d->mm = mm;
	d->entered = bpf_ktime_get_ns();
	d->what = PARAMETER(WHAT);
	if (s)
		d->order = __sync_fetch_and_add(&s->decisions, 1) + 1;
	d->n = 1;
	cell = decision_cell(d, 0);
	if (PARAMETER(MERGE) != NO_ARGUMENT)
		propose_merge(d, cell, ARGUMENT(MERGE));
	else
		propose(d, cell, args);
	if (PARAMETER(UNMAP) != NO_ARGUMENT)
		propose_unmap(d, cell, ARGUMENT(UNMAP));
	if (PARAMETER(DESCRIPTOR) != NO_ARGUMENT) {
		d->desc_at = ARGUMENT(DESCRIPTOR);
		add_descriptor(d, 0);
	}
	describe_given_file(d, args);
#pragma clang loop unroll(disable)
	for (int role = 1; role < ROLE_END; role++)
		if (d->vma_of[role & 7])
			add_neighbour(d, role, d->vma_of[role & 7]);
	return 0;
}

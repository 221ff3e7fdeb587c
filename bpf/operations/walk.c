// SPDX-License-Identifier: MIT OR GPL-2.0
/* The walk of the maple tree: slot by slot over up to three ranges, by a program that calls itself again. */

/* Members that some configurations lack. */
#ifdef OFF_vma_vm_policy
#define VMA_WORD_POLICY(v)	((v)[OFF_vma_vm_policy / 8])
#else
#define VMA_WORD_POLICY(v)	0
#endif
#ifdef OFF_vma_vm_userfaultfd_ctx
#define VMA_WORD_UFFD(v)	((v)[OFF_vma_vm_userfaultfd_ctx / 8])
#else
#define VMA_WORD_UFFD(v)	0
#endif
#ifdef VMA_NAME_IN_UNION	/* with what a file's tree needs, up to 6.1: a name only without a file */
#define VMA_WORD_NAME(v)	((v)[OFF_vma_vm_file / 8] ? 0 : (v)[OFF_vma_anon_name / 8])
#elif defined(OFF_vma_anon_name)
#define VMA_WORD_NAME(v)	((v)[OFF_vma_anon_name / 8])
#else
#define VMA_WORD_NAME(v)	0
#define OFF_anon_name_name	0
#endif

#define MPOL_LOCAL		4
#define MPOL_KEEPS_USER_MASK	0xc000	/* MPOL_F_STATIC_NODES | MPOL_F_RELATIVE_NODES */

/*
 * A NUMA policy by its content, in one word; 0 for none. Pointers would not do: each VMA has a copy of its own.
 * As in __mpol_equal(), the user's mask counts where the flags say that it is kept, and nodes not for MPOL_LOCAL.
 */
static __always_inline u64 policy_content(u64 policy)
{
	u64 mode, flags, word;

	if (!policy)
		return 0;
	word = read_half(policy + OFF_mempolicy_mode);
	mode = word & 0xf;
	flags = word >> 16 & 0xffff;
	word = (mode + 1) | flags << 4;
#ifdef OFF_mempolicy_home_node
	word |= (read_half(policy + OFF_mempolicy_home_node) & 0xff) << 20;
#endif
	if (mode != MPOL_LOCAL)
		word |= (read_word(policy + OFF_mempolicy_nodes) & 0xffff) << 28;
	if (flags & MPOL_KEEPS_USER_MASK)
		word |= (read_word(policy + OFF_mempolicy_w) & 0xffff) << 44;
	return word;
}

/*
 * One VMA as a cell, and its rare attributes as another. What is found out goes to memory at once: the verifier
 * forgets there which way it came, and follows one path on instead of many.
 */
static __always_inline void add_row(struct space *s, u64 vma)
{
	u64 *v = s->vma, *cell, ops, chain;

	if (bpf_probe_read_kernel(v, VMA_READ_SIZE, (void *)vma))
		s->cover_flags |= COVER_UNREADABLE;
	chain = v[OFF_vma_anon_vma_chain / 8] ^ v[OFF_vma_anon_vma_chain / 8 + 1];
	s->bits = 0;
	if (chain)
		s->bits |= ROW_FORKED;
	ops = v[OFF_vma_vm_ops / 8];
	if (!ops)
		s->bits |= ROW_ANONYMOUS;
	else if (read_word(ops + OFF_vm_ops_close))
		s->bits |= ROW_CLOSE;
	if (v[OFF_vma_vm_file / 8])
		note_file(s, v[OFF_vma_vm_file / 8]);
	if (VMA_WORD_POLICY(v) | VMA_WORD_UFFD(v) | VMA_WORD_NAME(v))
		s->bits |= ROW_EXTRA;
	cell = next_cell(s, s->role | (u64)s->bits << 32);
	cell[1] = v[OFF_vma_vm_start / 8];
	cell[2] = v[OFF_vma_vm_end / 8];
	cell[3] = v[OFF_vma_vm_flags / 8];
	cell[4] = v[OFF_vma_vm_pgoff / 8];
	cell[5] = vma;
	cell[6] = v[OFF_vma_anon_vma / 8];
	cell[7] = v[OFF_vma_vm_file / 8];
	s->rows++;
	if (!(s->bits & ROW_EXTRA))
		return;
	cell = next_cell(s, CELL_EXTRA | (u64)s->role << 8);
	cell[1] = VMA_WORD_UFFD(v);
	cell[2] = policy_content(VMA_WORD_POLICY(v));
	cell[3] = 0;
	cell[4] = 0;
	cell[5] = 0;
	cell[6] = 0;
	cell[7] = 0;
	if (VMA_WORD_NAME(v))
		bpf_probe_read_kernel_str(&cell[3], 40, (void *)(VMA_WORD_NAME(v) + OFF_anon_name_name));
}

/* Closes one walked range: the interval it is complete for, with the mm's own fields of that moment. */
static __always_inline void add_cover(struct space *s, u64 mm, u64 lo, u64 hi)
{
	u64 *cell = next_cell(s, CELL_COVER | (u64)s->role << 8 | (u64)s->cover_flags << 16 | (u64)s->rows << 32);

	cell[1] = lo;
	cell[2] = hi;
	if (s->role == CELL_BEFORE) {
		cell[3] = s->acquired;
		bpf_probe_read_kernel(s->mm_words, MM_READ_SIZE, (void *)(mm + OFF_mm_total_vm));
		cell[4] = s->mm_words[MM_WORD(def_flags)];
		cell[5] = read_word(mm + OFF_mm_flags);
		cell[6] = s->mm_words[MM_WORD(brk)];
		cell[7] = s->mm_words[MM_WORD(start_brk)];
	} else {
		bpf_probe_read_kernel(s->mm_words, MM_READ_SIZE, (void *)(mm + OFF_mm_total_vm));
		cell[3] = read_half(mm + OFF_mm_map_count);
		cell[4] = s->mm_words[MM_WORD(total_vm)];
		cell[5] = s->mm_words[MM_WORD(data_vm)];
		cell[6] = s->mm_words[MM_WORD(stack_vm)];
		cell[7] = s->mm_words[MM_WORD(locked_vm)];
	}
	s->rows = 0;
}

static __always_inline void close_section(struct space *s)
{
	send(s, s->finished ? 0 : SECTION_PARTIAL);
	s->open_tid = 0;
	s->kind = KIND_SECTION;
}

static __always_inline void start_range(struct space *s)
{
	u32 at = s->current_range;

	if (at > 2)
		at = 2;
	s->walk_addr = s->range[2 * at] ? s->range[2 * at] - 1 : 0;
	s->cover_lo = ADDR_END;
	s->in_leaf = 0;
	s->walk_node = 0;
	s->done = 0;
}

#define COUNT_PIVOT(j)							\
	t = ((v[j + 1] - 1) >> 12) - (addr >> 12);			\
	asm volatile("" : "+r"(t));					\
	i += (t >> 63) & (j < 9 ? 1 : wide);

/* One level down or one slot on. Returns 1 when all ranges are done. */
static __always_inline int step(struct space *s, u64 mm)
{
	u64 *v = s->node, addr = s->walk_addr, t, lo, hi, entry, end;
	u64 wide, i = 0;
	u32 at = s->current_range, base;

	if (at > 2)
		return 1;
	make_room(s);
	if (!s->in_leaf) {
		u64 node = s->walk_node;

		if (!node) {
			node = read_word(s->root_at);
			if ((node & 3) != 2) {
				s->cover_flags |= COVER_NO_TREE;
				return 1;
			}
			s->walk_min = 0;
			s->walk_max = ADDR_END;
		}
		if (bpf_probe_read_kernel(v, 256, (void *)(node & NODE_MASK)))
			s->cover_flags |= COVER_UNREADABLE;
		if ((v[0] & NODE_MASK) == (node & NODE_MASK))
			s->cover_flags |= COVER_DEAD_NODE;
		u32 type = node >> 3 & 15;

		wide = ((type ^ MAPLE_ARANGE) + 1) >> 1;	/* types 1, 2, 3: without a branch */
		COUNT_PIVOT(0) COUNT_PIVOT(1) COUNT_PIVOT(2) COUNT_PIVOT(3) COUNT_PIVOT(4)
		COUNT_PIVOT(5) COUNT_PIVOT(6) COUNT_PIVOT(7) COUNT_PIVOT(8) COUNT_PIVOT(9)
		COUNT_PIVOT(10) COUNT_PIVOT(11) COUNT_PIVOT(12) COUNT_PIVOT(13) COUNT_PIVOT(14)
		base = OFF_arange64_slot / 8 + wide * ((OFF_range64_slot - OFF_arange64_slot) / 8);
		entry = v[hidden(base + i) & 31];
		end = v[hidden(i + 1) & 31];
		hi = (i + 1 < base && end) ? end : s->walk_max;
		lo = i ? v[hidden(i) & 31] + 1 : s->walk_min;
		if (type != MAPLE_LEAF) {
			s->walk_min = lo;
			s->walk_max = hi;
			s->walk_node = entry;
			if (!(entry & NODE_MASK)) {
				s->cover_flags |= COVER_UNREADABLE;
				return 1;
			}
			return 0;
		}
		s->in_leaf = 1;
		s->slot = i;
	}
	i = s->slot & 15;
	entry = v[hidden(OFF_range64_slot / 8 + i) & 31];
	end = v[hidden(i + 1) & 31];
	hi = (i < 15 && end) ? end : s->walk_max;
	lo = i ? v[hidden(i) & 31] + 1 : s->walk_min;
	if (s->cover_lo == ADDR_END)
		s->cover_lo = lo;
	if (entry)
		add_row(s, entry);
	s->walk_addr = hi + 1;
	if (hi >= s->range[2 * at + 1]) {
		add_cover(s, mm, s->cover_lo, hi == ADDR_END ? ADDR_END : hi + 1);
		s->current_range = at + 1;
		if (at + 1 >= s->ranges)
			return 1;
		start_range(s);
		return 0;
	}
	if (hi >= s->walk_max || i >= 15) {
		s->in_leaf = 0;
		s->walk_node = 0;
	} else {
		s->slot = i + 1;
	}
	return 0;
}

static __always_inline struct space *walked_space(struct bpf_raw_tracepoint_args *ctx, u64 *mm)
{
	struct space *s;

	*mm = ctx->args[0];
	s = spaces.lookup(mm);
	if (s)
		return s;
	*mm = current_mm();
	return spaces.lookup(mm);
}

/* The tail-called walker. The raw tracepoint's first argument is the mm at the lock hooks; elsewhere current's. */
int walk(struct bpf_raw_tracepoint_args *ctx)
{
	struct space *s;
	u64 mm;

	s = walked_space(ctx, &mm);
	if (!s)
		return 0;
#pragma clang loop unroll(disable)
	for (int n = 0; n < WALK_STEPS; n++) {
		if (s->done || s->new_files >= NEW_FILES)
			break;
		s->done = step(s, mm);
	}
	if (s->new_files)
		walker.call(ctx, 1);
	if (!s->done) {
		walker.call(ctx, 0);
		s->cover_flags |= COVER_CUT;	/* out of tail calls */
		add_cover(s, mm, s->cover_lo, s->walk_addr);
	}
	if (s->role == CELL_AFTER)
		close_section(s);
	return 0;
}

/* One noted file a run, then itself again or back to the walk. */
int describe_files(struct bpf_raw_tracepoint_args *ctx)
{
	struct space *s;
	u64 mm;
	u32 at;

	s = walked_space(ctx, &mm);
	if (!s)
		return 0;
	at = s->new_files - 1;
	s->new_files = at;
	describe_file(s->new_file[at & (NEW_FILES - 1)]);
	walker.call(ctx, at ? 1 : 0);
	return 0;
}

static __always_inline void set_range(struct space *s, u32 at, u64 lo, u64 hi)
{
	if (at > 2)
		return;
	s->range[2 * at] = lo;
	s->range[2 * at + 1] = hi;
	s->ranges = at + 1;
}

/* [address, address + length), the end rounded up to pages; an impossible range is left out. */
static __always_inline void add_user_range(struct space *s, u64 address, u64 length)
{
	u64 lo = address & ~(PAGE_BYTES - 1);
	u64 hi = (address + length + PAGE_BYTES - 1) & ~(PAGE_BYTES - 1);

	if (length < 1ULL << 60 && hi > lo && lo < 1ULL << 60 && s->ranges < 3)
		set_range(s, s->ranges, lo, hi);
}

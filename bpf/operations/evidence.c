// SPDX-License-Identifier: MIT OR GPL-2.0
/* The second evidence: stores, births and deaths of VMA objects; anon_vma gains. */

static __always_inline void add_evidence(struct space *s, u64 what, u64 object, u64 lo, u64 hi)
{
	u64 *cell;

	if (s->evidence & 1) {
		cell = &s->cells[((s->n - 1) & 63) * 8];
		cell[0] |= what << 16;
		cell[4] = object;
		cell[5] = lo;
		cell[6] = hi;
	} else {
		make_room(s);
		cell = next_cell(s, CELL_EVIDENCE | what << 8);
		cell[1] = object;
		cell[2] = lo;
		cell[3] = hi;
		cell[4] = 0;
		cell[5] = 0;
		cell[6] = 0;
		cell[7] = 0;
	}
	s->evidence++;
}

static __always_inline struct space *open_space(u64 mm)
{
	struct space *s = spaces.lookup(&mm);

	if (!s || s->dead || s->open_tid != (u32)bpf_get_current_pid_tgid())
		return 0;
	return s;
}

/* The space in whose write section the task is: its own, or another process's (a userfaultfd, process_madvise). */
static __always_inline struct space *entered_space(void)
{
	struct space *s = open_space(current_mm());
	u32 tid = bpf_get_current_pid_tgid();
	u64 *open, *mm;
	int zero = 0;

	if (s)
		return s;
	open = foreign_open.lookup(&zero);
	if (!open || !*open)
		return 0;
	mm = foreign_mm.lookup(&tid);
	return mm ? open_space(*mm) : 0;
}

HOOK(ma_write)
{
	u64 mas[3], fn, *known, text[2] = {}, mm;
	struct space *s;
	int zero = 0;

	if (!ctx->args[3])
		return 0;
	fn = ctx->args[0];
	known = store_fn.lookup(&zero);
	if (!known)
		return 0;
	if (*known != fn) {
		if (*known)
			return 0;
		bpf_probe_read_kernel(text, 16, (void *)fn);
		/* "mas_store_prealloc": all other names repeat it or belong to other trees */
		if (text[0] != 0x726f74735f73616dULL || (text[1] & 0xffffff) != 0x705f65)
			return 0;
		*known = fn;
	}
	bpf_probe_read_kernel(mas, 24, (void *)ctx->args[1]);
	mm = mas[0] - OFF_mm_mm_mt;
	s = open_space(mm);
	if (!s || s->op_class == OP_FORK)
		return 0;
	add_evidence(s, EVIDENCE_STORE, ctx->args[3], mas[1], mas[2] + 1);
	/* A walk of a range reads whole slots, its neighbours' too: only a store that touches none needs more. */
#pragma unroll
	for (u32 r = 0; r < 3; r++)
		if (r < s->ranges && mas[1] <= s->range[2 * r + 1] && mas[2] + 1 >= s->range[2 * r])
			return 0;
	if (mas[1] < s->store_lo)
		s->store_lo = mas[1];
	if (mas[2] + 1 > s->store_hi)
		s->store_hi = mas[2] + 1;
	return 0;
}

static __always_inline void anon_vma_gained(u64 cache)
{
	u64 mm = current_mm(), name[2] = {}, cells[16] = {}, id = bpf_get_current_pid_tgid();
	struct space *s = spaces.lookup(&mm);

	if (!s)
		return;
	bpf_probe_read_kernel_str(name, 16, (void *)read_word(cache + OFF_kmem_cache_name));
	if ((u8)name[1] == 0)
		return;		/* "anon_vma" itself; one "anon_vma_chain" is allocated per gain */
	fill_head(cells, KIND_ANON_VMA, PLACE(s), id);
	cells[6] = s->open_tid == (u32)id;
	cells[8] = CELL_ARGS;
	send_small(cells);
}

/* Policies and more are freed from the same functions: only what comes from the VMAs' own cache is a VMA. */
static __always_inline void learn_vma_cache(u64 cache)
{
	int zero = 0;
	u64 *known = vma_cache.lookup(&zero);

	if (known)
		*known = cache;
}

static __always_inline int from_other_cache(u64 cache)
{
	int zero = 0;
	u64 *known = vma_cache.lookup(&zero);

	return known && *known && *known != cache;
}

HOOK(kmem_cache_alloc)
{
	u64 site = ctx->args[0];
	struct space *s;
	u64 what;

	if (site - TEXT_vm_area_alloc < SIZE_vm_area_alloc)
		what = EVIDENCE_ALLOC;
	else if (site - TEXT_vm_area_dup < SIZE_vm_area_dup)
		what = EVIDENCE_DUP;
	else if (site - TEXT___anon_vma_prepare < SIZE___anon_vma_prepare) {
		anon_vma_gained(ctx->args[2]);
		return 0;
	} else
		return 0;
	if (!compat_is_vma_cache(ctx->args[2]))
		return 0;
	learn_vma_cache(ctx->args[2]);
	s = entered_space();
	if (s && s->op_class != OP_FORK)
		add_evidence(s, what, ctx->args[1], 0, 0);
	return 0;
}

HOOK(kmem_cache_free)
{
	u64 site = ctx->args[0];
	struct space *s;
	u64 what;

	if (site - TEXT_vma_lo >= TEXT_vma_span)
		return 0;
	if (SITE_merged(site))
		what = EVIDENCE_MERGED;
	else if (SITE_unmapped(site))
		what = EVIDENCE_UNMAPPED;
	else if (SITE_freed(site))
		what = EVIDENCE_FREED;
	else
		return 0;
	if (from_other_cache(ctx->args[2]))
		return 0;
	s = entered_space();
	if (s && s->op_class != OP_FORK)
		add_evidence(s, what, ctx->args[1], 0, 0);
	return 0;
}

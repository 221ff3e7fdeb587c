// SPDX-License-Identifier: MIT OR GPL-2.0
/* The return of a probed function: its answer is added to what it was asked, and the record leaves. */

#define RETURNS_NOTHING	0
#define RETURNS_NUMBER	1
#define RETURNS_POINTER	2
#define RETURNS_ADDRESS	3	/* of user memory: only an errno is an answer */
#define IS_ERROR(value)	((value) > -4096ULL)

/* The VMA that came of it: returned, the merge's target, or an argument's, looked at again. */
static __always_inline u64 resulting_vma(struct decision *d, u64 answer)
{
	if (PARAMETER(RETURNS) == RETURNS_POINTER)
		return IS_ERROR(answer) ? 0 : answer;
#ifdef OFF_vmg_target
	if (PARAMETER(MERGE) != NO_ARGUMENT)
		return read_word(d->merge_at + OFF_vmg_target);
#endif
	if (PARAMETER(RESULT_BEHIND))
		return read_word(d->result_at);
	return d->result_at;
}

static __always_inline void finish_proposal(struct decision *d, struct space *s, u64 *head)
{
	u64 state = 0, *cell = &d->cells[8];

#ifdef OFF_vmg_state
	if (PARAMETER(MERGE) != NO_ARGUMENT)
		state = MERGE_STATE(read_half(d->merge_at + OFF_vmg_state));
#endif
	if (s && s->open_tid == (u32)bpf_get_current_pid_tgid()) {
		d->bits |= PROPOSAL_IN_SECTION;
		head[1] |= (u64)s->op_class << 16 | (u64)s->abi << 24 | (u64)s->nr << 32;
	}
	cell[0] = CELL_PROPOSAL | state << 8 | (u64)d->bits << 16 | (u64)d->order << 32;
}

static __always_inline void send_decision(struct decision *d, u64 answer)
{
	u64 *head = d->cells, size;
	struct space *s = spaces.lookup(&d->mm);

	fill_head(head, KIND_DECISION | d->what << 8 | PARAMETER(PROBE) << 48, s ? PLACE(s) : 0,
		  bpf_get_current_pid_tgid());
	head[6] = answer;
	head[7] = d->entered;
	finish_proposal(d, s, head);
	size = hidden(d->n * 64ULL - 8) & 1023;
	if (ring.ringbuf_output(&head[1], size, NO_WAKEUP))
		bump(COUNT_LOST);
}

static __always_inline int returned(u64 answer)
{
	u64 key = pending_key(), vma;
	struct decision *d;

	d = pending.lookup(&key);
	if (!d)
		return 0;
	if (!spaces.lookup(&d->mm) && !builds_image()) {	/* not traced any more */
		pending.delete(&key);
		return 0;
	}
	if (PARAMETER(RETURNS) == RETURNS_NOTHING)
		answer = 0;
	if (PARAMETER(RETURNS) == RETURNS_NUMBER)
		answer = (s64)(s32)answer;
	if (PARAMETER(RETURNS) == RETURNS_ADDRESS && !IS_ERROR(answer))
		answer = 0;
	if (PARAMETER(DESCRIPTOR) != NO_ARGUMENT)
		add_descriptor(d, 1);
	vma = resulting_vma(d, answer);
	if (vma)
		add_neighbour(d, ROLE_RESULT, vma);
#ifdef OFF_vma_anon_pgoff_lo
	u64 *cell = decision_cell(d, CELL_ANON_PGOFF);

	cell[1] = d->anon_pgoff[0];
	cell[2] = d->anon_pgoff[1];
	cell[3] = d->anon_pgoff[2];
	cell[4] = d->anon_pgoff[3];
	cell[5] = d->anon_pgoff[4];
	cell[6] = d->anon_pgoff[5];
	cell[7] = d->anon_pgoff[6];
#endif
	send_decision(d, answer);
	pending.delete(&key);
	return 0;
}

/*
 * vm_area_free() ends in a jump to kmem_cache_free(), which takes the address that it would return to for its caller. A
 * probe on its return stands there itself, and the operations layer would no longer see who frees a VMA: it is told at
 * the call.
 */
static __always_inline int answered_at_once(void)
{
	return PARAMETER(WHAT) == DECISION_VMA_FREE ? returned(0) : 0;
}

/* By trampoline: the context is the arguments, at the return with the answer behind them. */
int enter_function(u64 *ctx)
{
	u64 args[ARGUMENTS] = {};

	bpf_probe_read_kernel(args, PARAMETER(ARGUMENT_BYTES) & 127, ctx);
	called(args);
	return answered_at_once();
}

int leave_function(u64 *ctx)
{
	u64 answer = 0;

	bpf_probe_read_kernel(&answer, 8, (void *)ctx + PARAMETER(ARGUMENT_BYTES));
	return returned(answer);
}

/* By kprobe: the context is the registers. */
int enter_kprobe(u64 *ctx)
{
	u64 args[ARGUMENTS] = {};

	compat_read_arguments((u64)ctx, args);
	called(args);
	return answered_at_once();
}

int leave_kprobe(u64 *ctx)
{
	return returned(compat_read_answer((u64)ctx));
}

// SPDX-License-Identifier: MIT OR GPL-2.0
/* How records leave: cells of a write section, gathered and sent; small records of their own. */

#define PLACE(s)	((s)->id | (u64)(s)->seq << 32)	/* an address space, and its write sections so far */

/* The words that all heads share: what, when, of which address space, by which task, on which CPU. */
static __always_inline void fill_head(u64 *head, u64 what, u64 place, u64 task)
{
	head[1] = what;
	head[2] = bpf_ktime_get_ns();
	head[3] = place;
	head[4] = task;
	head[5] = bpf_get_smp_processor_id() | bump(COUNT_RECORDS) << 16;
}

/*
 * Sends the gathered cells. A failed reserve marks the space dirty: its next section reads the whole tree. A section
 * that lacks a part is worth nothing to the reader, so it is lost as a whole, whatever its later parts tell.
 */
static __always_inline void send(struct space *s, u32 flags)
{
	u64 *head = &s->cells[0], size = s->n * 64ULL - 8;

	asm volatile("" : "+r"(size));
	size &= 4095;
	fill_head(head,
		  s->kind | flags << 8 | (u64)s->op_class << 16 | (u64)s->abi << 24 | (u64)s->nr << 32 | (u64)s->part << 48,
		  PLACE(s), bpf_get_current_pid_tgid());
	s->part++;
	head[6] = s->mm_words[MM_WORD(brk)];
	head[7] = s->arg;
	if (ring.ringbuf_output(&s->cells[1], size, NO_WAKEUP)) {
		bump(COUNT_LOST);
		s->broken = 1;
	}
	if (s->broken)
		s->dirty = 1;
	s->n = 1;
	s->evidence &= ~1U;
}

/* Called where cells are added again and again; leaves room for the few that one step adds. */
static __always_inline void make_room(struct space *s)
{
	if (s->n >= CELL_MAX)
		send(s, SECTION_PARTIAL);
}

static __always_inline u64 *next_cell(struct space *s, u64 tag)
{
	u64 *cell = &s->cells[(s->n & 63) * 8];

	cell[0] = tag;
	s->n++;
	return cell;
}

/* A CALL, TASK or other small record that belongs to no write section: head cell and one more. */
static __always_inline int send_small(u64 *cells)
{
	if (!ring.ringbuf_output(cells + 1, 120, NO_WAKEUP))
		return 1;
	bump(COUNT_LOST);
	return 0;
}

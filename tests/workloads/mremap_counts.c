/* SPDX-License-Identifier: MIT */
/*
 * mremap: 23 shrink in place (1 split, 1 unmap each), 29 grow in place (1 merge with itself = 1 grow),
 * 3 grow and swallow the next VMA (1 merge, 1 grow, 1 victim), 31 moves of a whole VMA (1 copy, 1 unmap), 13 moves of
 * a middle page (1 copy, 2 splits, 1 unmap), 11 moves next to a fitting VMA (1 merge, 1 unmap),
 * 7 DONTUNMAP (1 copy), 5 duplicates of a shared map (old size 0; 1 copy), 19 refused (nothing).
 */
#include "workload.h"

enum { SHRINK = 23, GROW = 29, FILL = 3, MOVE = 31, MIDDLE = 13, JOIN = 11, KEEP = 7, DUP = 5, REFUSED = 19 };

static void in_place(void)
{
	char *at = wl_room(SHRINK + GROW + 1);

	wl_anon(at, SHRINK + 1, RW);
	want.fresh++;
	for (long n = SHRINK + 1; n > 1; n--) {
		wl_mremap(at, n, n - 1, 0, NULL);
		want.split++;
		want.unmap++;
		wl_check("shrink");
	}
	for (long n = 1; n <= GROW; n++) {
		wl_mremap(at, n, n + 1, 0, NULL);
		want.merge++;
		want.grow++;
		wl_check("grow");
	}
	wl_clear(at, GROW + 1, 1);
}

static void fill_gap(void)
{
	char *at = wl_room(2 * FILL + 1);

	for (long i = 0; i <= FILL; i++) {
		wl_anon(at + 2 * i * wl.page, 1, RW);
		want.fresh++;
	}
	for (long i = 0; i < FILL; i++) {
		/* From the first page to the next island: the range up to it, swallowing it. */
		wl_mremap(at, 2 * i + 1, 2 * i + 2, 0, NULL);
		want.merge++;
		want.grow++;
		want.victims++;
		wl_check("fill");
	}
	wl_clear(at, 2 * FILL + 1, 1);
}

static void moves(void)
{
	char *at = wl_room(4 * MOVE);

	/* Each source has been written: it keeps its pgoff and fits nowhere else. */
	for (long i = 0; i < MOVE; i++) {
		char *from = at + 4 * i * wl.page;

		wl_anon(from, 1, RW);
		want.fresh++;
		*from = 1;
		wl_mremap(from, 1, 1, MREMAP_MAYMOVE | MREMAP_FIXED, from + 2 * wl.page);
		want.copy++;
		want.unmap++;
		wl_check("move");
	}
	wl_clear(at, 4 * MOVE, MOVE);
}

static void middles(void)
{
	char *at = wl_room(5 * MIDDLE);

	for (long i = 0; i < MIDDLE; i++) {
		char *from = at + 5 * i * wl.page;

		wl_anon(from, 3, RW);
		want.fresh++;
		from[wl.page] = 1;
		wl_mremap(from + wl.page, 1, 1, MREMAP_MAYMOVE | MREMAP_FIXED, from + 4 * wl.page);
		want.copy++;
		want.split += 2;
		want.unmap++;
		wl_check("middle");
		/* The moved page would touch the next round's first page: let it go. */
		wl_clear(from + 4 * wl.page, 1, 1);
	}
	wl_clear(at, 5 * MIDDLE, 2 * MIDDLE);
}

static void joins(void)
{
	char *at = wl_room(JOIN + 5);
	char *from = at + (JOIN + 3) * wl.page;

	/* Unfaulted: pgoff is set anew at the target, so it joins the VMA on its left. */
	wl_anon(at, 1, RW);
	want.fresh++;
	for (long i = 1; i <= JOIN; i++) {
		wl_anon(from, 1, RW);
		want.fresh++;
		wl_mremap(from, 1, 1, MREMAP_MAYMOVE | MREMAP_FIXED, at + i * wl.page);
		want.merge++;
		want.unmap++;
		wl_check("join");
	}
	wl_clear(at, JOIN + 1, 1);
}

static void keeps(void)
{
	char *at = wl_room(4 * KEEP);

	for (long i = 0; i < KEEP; i++) {
		char *from = at + 4 * i * wl.page;

		wl_anon(from, 1, RW);
		want.fresh++;
		*from = 1;
		wl_mremap(from, 1, 1, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, from + 2 * wl.page);
		want.copy++;
		wl_check("keep");
	}
	wl_clear(at, 4 * KEEP, 2 * KEEP);
}

static void duplicates(void)
{
	char *at = wl_room(2 * DUP + 2);

	wl_mmap(at, 1, RW, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	want.fresh++;
	for (long i = 1; i <= DUP; i++) {
		wl_mremap(at, 0, 1, MREMAP_MAYMOVE | MREMAP_FIXED, at + 2 * i * wl.page);
		want.copy++;
		wl_check("duplicate");
	}
	wl_clear(at, 2 * DUP + 2, DUP + 1);
}

static void refusals(void)
{
	char *at = wl_room(2);

	wl_anon(at, 2, RW);
	want.fresh++;
	for (long i = 0; i < REFUSED; i++) {
		/* New size 0: EINVAL before anything is looked at. */
		if (mremap(at, wl.page, 0, MREMAP_MAYMOVE) != MAP_FAILED)
			wl_die("mremap to size 0");
		want.mremap++;
		want.failed++;
	}
	wl_clear(at, 2, 1);
}

int main(int argc, char **argv)
{
	wl_start(argc, argv, "mremap_counts");
	in_place();
	fill_gap();
	moves();
	middles();
	joins();
	keeps();
	duplicates();
	refusals();
	wl_finish();
}

/* SPDX-License-Identifier: MIT */
/*
 * Splits: 23 by mprotect, 29 by munmap (14 holes with two cuts each, 1 trimmed head), 19 by madvise,
 * 13 by MAP_FIXED overlays (6 in the middle with two cuts each, 1 at the head): 84 in all.
 *
 * Nothing ever merges: neighbours always differ in protection or in DONTFORK/DONTDUMP.
 */
#include "workload.h"

enum { BY_MPROTECT = 23, HOLES = 14, BY_MADVISE = 19, OVERLAYS = 6 };

/* Page i of the rest is cut off at its head: RO, NONE, RO, NONE... so that no two agree. */
static void by_mprotect(void)
{
	char *at = wl_room(BY_MPROTECT + 1);

	wl_anon(at, BY_MPROTECT + 1, RW);
	want.fresh++;
	for (long i = 0; i < BY_MPROTECT; i++) {
		wl_mprotect(at + i * wl.page, 1, i % 2 ? NONE : RO);
		want.split++;
		wl_check("mprotect");
	}
	wl_clear(at, BY_MPROTECT + 1, BY_MPROTECT + 1);
}

static void by_munmap(void)
{
	long pages = 2 * HOLES + 2;
	char *at = wl_room(pages);

	wl_anon(at, pages, RW);
	want.fresh++;
	wl_munmap(at, 1);
	want.split++;
	want.unmap++;
	wl_check("munmap head");
	for (long i = 0; i < HOLES; i++) {
		wl_munmap(at + (2 * i + 2) * wl.page, 1);
		want.split += 2;
		want.unmap++;
		wl_check("munmap hole");
	}
	wl_clear(at, pages, HOLES + 1);
}

static void by_madvise(void)
{
	char *at = wl_room(BY_MADVISE + 1);

	wl_anon(at, BY_MADVISE + 1, RW);
	want.fresh++;
	for (long i = 0; i < BY_MADVISE; i++) {
		wl_madvise(at + i * wl.page, 1, i % 2 ? MADV_DONTDUMP : MADV_DONTFORK);
		want.split++;
		wl_check("madvise");
	}
	wl_clear(at, BY_MADVISE + 1, BY_MADVISE + 1);
}

static void by_overlay(void)
{
	long pages = 2 * OVERLAYS + 2;
	char *at = wl_room(pages);

	wl_anon(at, pages, RW);
	want.fresh++;
	for (long i = 0; i <= OVERLAYS; i++) {
		wl_mmap(at + 2 * i * wl.page, 1, RO, ANON | MAP_FIXED, -1, 0);
		want.split += i ? 2 : 1;
		want.unmap++;
		want.fresh++;
		wl_check("overlay");
	}
	wl_clear(at, pages, 2 * OVERLAYS + 2);
}

int main(int argc, char **argv)
{
	wl_start(argc, argv, "splits");
	by_mprotect();
	by_munmap();
	by_madvise();
	by_overlay();
	wl_finish();
}

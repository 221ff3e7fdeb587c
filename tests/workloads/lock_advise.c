/* SPDX-License-Identifier: MIT */
/*
 * mlock: 17 head pages locked (17 splits: alternately mlock and mlock2 ONFAULT), then 17 munlocks from
 * the top (17 merges to the right, 17 victims, each a whole VMA).
 * madvise: 11 pages inside made DONTDUMP (22 splits), DODUMP again (11 merges with both sides, 22 victims);
 * 13 calls that change no VMA (DONTNEED); 5 that fail (a bad advice), 3 that fail with ENOMEM for a
 * gap but cut all the same (2 splits each).
 */
#include "workload.h"

enum { LOCKS = 17, DUMPS = 11, IDLE = 13, BAD = 5, GAPS = 3 };

static void locks(void)
{
	char *at = wl_room(LOCKS + 1);

	wl_anon(at, LOCKS + 1, RW);
	want.fresh++;
	/* One anon_vma for all pieces to come; pages populated while apart would never join again. */
	*at = 1;
	for (long i = 0; i < LOCKS; i++) {
		/* Plain and ONFAULT differ, so the neighbours do too. */
		if (i % 2) {
			want.mlock2++;
			if (syscall(SYS_mlock2, at + i * wl.page, wl.page, 1))
				wl_die("mlock2");
		} else {
			want.mlock++;
			if (mlock(at + i * wl.page, wl.page))
				wl_die("mlock");
		}
		want.split++;
		wl_check("lock");
	}
	for (long i = LOCKS - 1; i >= 0; i--) {
		want.munlock++;
		if (munlock(at + i * wl.page, wl.page))
			wl_die("munlock");
		want.merge++;
		want.victims++;
		wl_check("unlock");
	}
	wl_clear(at, LOCKS + 1, 1);
}

static void dumps(void)
{
	char *at = wl_room(2 * DUMPS + 1);

	wl_anon(at, 2 * DUMPS + 1, RW);
	want.fresh++;
	for (long i = 0; i < DUMPS; i++) {
		wl_madvise(at + (2 * i + 1) * wl.page, 1, MADV_DONTDUMP);
		want.split += 2;
		wl_check("DONTDUMP");
	}
	for (long i = 0; i < DUMPS; i++) {
		wl_madvise(at + (2 * i + 1) * wl.page, 1, MADV_DODUMP);
		want.merge++;
		want.victims += 2;
		wl_check("DODUMP");
	}
	for (long i = 0; i < IDLE; i++)
		wl_madvise(at, 2 * DUMPS + 1, MADV_DONTNEED);
	for (long i = 0; i < BAD; i++) {
		if (!madvise(at, wl.page, 9999))
			wl_die("a bad advice was taken");
		want.madvise++;
		want.failed++;
	}
	wl_clear(at, 2 * DUMPS + 1, 1);
}

/* Three pages, a hole, three pages: from the last before the hole to the first after it. */
static void gaps(void)
{
	for (long i = 0; i < GAPS; i++) {
		char *at = wl_room(7);

		wl_anon(at, 3, RW);
		wl_anon(at + 4 * wl.page, 3, RW);
		want.fresh += 2;
		if (!madvise(at + 2 * wl.page, 3 * wl.page, MADV_DONTDUMP) || errno != ENOMEM)
			wl_die("madvise over a gap");
		want.madvise++;
		want.failed++;
		want.split += 2;
		wl_check("gap");
		wl_clear(at, 7, 4);
	}
}

int main(int argc, char **argv)
{
	wl_start(argc, argv, "lock_advise");
	locks();
	dumps();
	gaps();
	wl_finish();
}

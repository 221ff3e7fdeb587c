/* SPDX-License-Identifier: MIT */
/*
 * vmafuzz SEED N: N random calls that shape this process's VMAs, with faults and fork children between
 * them, ending in an exact dump of /proc/self/maps. The same SEED asks for the same things (what the
 * kernel answers depends on where it puts maps).
 *
 *   -o FILE        the final maps of this process, exact: no VMA changes after the dump
 *   -C DIR         each fork child's final maps, in DIR/maps.PID
 *   -c FILE        append one JSON line a process: calls made and calls that succeeded, by name
 *   -x STATUS      exit status
 *   -t FILE        temporary file for file maps (default: an unnamed one in /tmp); removed at once
 *   --ops LIST     only these kinds, separated by commas; `default`, `all`, or names with a weight, such
 *                  as "default,rlimit=3,fork=0"
 *   --threads T    T threads storm in one address space, N calls each (children only from the first)
 *   --children K   at most K fork children altogether (default N / 50)
 *   --narrow P     so many of 100 calls ask for the usual alone: equal attributes, so that neighbours merge
 *   --pace U       U microseconds of sleep after each 100 calls, so that a recorder keeps up
 *   --fill N       N single-page VMAs at the start, beside the arena: what happens at vm.max_map_count
 *   --overlay      maps a file of an overlay too, mounted in a namespace of its own (needs CAP_SYS_ADMIN)
 *   --uffd --ksm --mlockall   adds those kinds (a uffd needs CAP_SYS_PTRACE; KSM touches every VMA)
 *   --list         the kinds and their default weights
 *
 * Work goes on in an arena of 96 pages with free room around, so that neighbours meet often; what the
 * kernel places itself is kept in a table of strays and worked on as well. mseal has a vault of its own.
 * No malloc and no stdio after the start: every call that shapes VMAs goes through call() and is counted.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MAP_DROPPABLE
#define MAP_DROPPABLE 8
#endif
#ifndef SYS_mseal
#define SYS_mseal 462
#endif
#ifndef SYS_process_madvise
#define SYS_process_madvise 440
#endif
#ifndef SYS_set_mempolicy_home_node
#define SYS_set_mempolicy_home_node 450
#endif
#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67
#endif
#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41
#endif
#ifndef PR_SET_MDWE
#define PR_SET_MDWE 65
#endif
#ifndef SYS_memfd_secret
#define SYS_memfd_secret 447
#endif
#define ADVICE_GUARD_INSTALL 102
#define ADVICE_GUARD_REMOVE 103

enum {
	ARENA = 96, MARGIN = 300, VAULT = 40, STRAYS = 48, FILE_PAGES = 64,
	MAX_THREADS = 16, STACK = 1 << 17, BREAK_PAGES = 48, SEGMENTS = 4,
	/* Beyond all that is mapped of it: what lies past a file's end answers by its pages. */
	FILE_END = 192,
	BRIM = 800,
};

enum kind {
	K_MMAP, K_MUNMAP, K_MPROTECT, K_MREMAP, K_MADVISE, K_MLOCK, K_MLOCK2, K_MUNLOCK, K_MLOCKALL,
	K_MUNLOCKALL, K_BRK, K_MBIND, K_HOME, K_MSEAL, K_SHMAT, K_SHMDT, K_REMAP_FILE, K_PKEY, K_PROCESS_MADVISE,
	K_PRCTL_NAME, K_PRCTL_KSM, K_PRCTL_MDWE, K_UFFD, K_PERSONALITY, K_AIO, K_FORK, K_COUNT,
};

static const char *const kind_names[K_COUNT] = {
	"mmap", "munmap", "mprotect", "mremap", "madvise", "mlock", "mlock2", "munlock", "mlockall",
	"munlockall", "brk", "mbind", "set_mempolicy_home_node", "mseal", "shmat", "shmdt", "remap_file_pages",
	"pkey_mprotect", "process_madvise", "prctl_set_vma", "prctl_memory_merge", "prctl_set_mdwe", "userfaultfd_ioctl",
	"personality", "io_setup", "clone",
};

/* What one thread works with; a fork child goes on with its own copy. */
struct worker {
	uint64_t random;
	struct { char *at; size_t pages; } strays[STRAYS];
	void *segments[SEGMENTS];
	long calls[K_COUNT], good[K_COUNT];
	long n;
	int depth;
};

static size_t page;
static char *arena, *vault, *break_base, *brim;
/* What the kernel itself maps: the code of the vDSO and the data behind it, where they are known. */
static struct { char *at; size_t size; } vdso, vvar;
static int fd_rw, fd_ro, fd_mem, fd_mem_ro, fd_zero_write, fd_sealed, fd_dir;
static int fd_secret = -1, fd_stacked = -1, fd_uffd[2] = { -1, -1 };
static int threads = 1, exit_status;
static long children_left = -1, narrow, fill, pace, stacked;
static const char *dump_file, *child_directory, *counts_file;
static struct worker workers[MAX_THREADS];
static char stacks[MAX_THREADS][STACK] __attribute__((aligned(4096)));
static __thread sigjmp_buf escape;
static __thread volatile sig_atomic_t may_escape;

static void die(const char *what)
{
	static const char *const head = "vmafuzz: ";

	if (write(2, head, strlen(head)) < 0 || write(2, what, strlen(what)) < 0 || write(2, "\n", 1) < 0)
		_exit(99);
	_exit(99);
}

/* splitmix64: small, seeded, the same everywhere. */
static uint64_t next(struct worker *w)
{
	uint64_t z = (w->random += 0x9e3779b97f4a7c15ull);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

static long below(struct worker *w, long n)
{
	return (long)(next(w) % (uint64_t)n);
}

static int chance(struct worker *w, int percent)
{
	return below(w, 100) < percent;
}

/* Every call that shapes VMAs: the raw one, so that the C library adds nothing and hides nothing. */
static long call(struct worker *w, enum kind kind, long number, long a, long b, long c, long d, long e, long f)
{
	long result = syscall(number, a, b, c, d, e, f);

	w->calls[kind]++;
	w->good[kind] += result != -1;
	return result;
}

#define CALL(w, kind, number, a, b, c, d, e, f) \
	call(w, kind, number, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))

static void on_fault(int signal)
{
	(void)signal;
	if (!may_escape)
		die("a fault outside the arena");
	siglongjmp(escape, 1);
}

/* A fault that may be refused: by this thread itself, or by the kernel on its behalf. */
static void touch(struct worker *w, char *at, int writing)
{
	if (chance(w, 25)) {
		/* A read from /dev/zero writes the page, a write to it reads it; EFAULT where that may not be. */
		ssize_t moved = writing ? read(fd_zero_write, at, 1) : pwrite(fd_mem, at, 1, 0);

		(void)moved;
		return;
	}
	if (sigsetjmp(escape, 0) == 0) {
		may_escape = 1;
		if (writing)
			*(volatile char *)at = (char)w->n;
		else
			(void)*(volatile char *)at;
	}
	may_escape = 0;
}

/* Whether this call asks for the usual alone. */
static int usual(struct worker *w)
{
	return narrow && chance(w, narrow);
}

static long length(struct worker *w)
{
	return chance(w, 60) ? 1 + below(w, 4) : 1 + below(w, 12);
}

/* A range of the arena, sometimes of a stray map, sometimes of the break. */
static char *range(struct worker *w, long *pages)
{
	long n = length(w);
	long which = below(w, 100);

	*pages = n;
	if (usual(w))
		which = 99;
	if (which < 14) {
		long i = below(w, STRAYS);

		if (w->strays[i].at) {
			long first = below(w, w->strays[i].pages);

			if (n > (long)w->strays[i].pages - first)
				*pages = w->strays[i].pages - first;
			return w->strays[i].at + first * page;
		}
	}
	if (which < 17)
		return break_base + below(w, BREAK_PAGES) * page;
	if (which < 19) {
		*pages = 1 + below(w, 3);
		return vault + below(w, VAULT - 3) * page;
	}
	if (n > ARENA)
		n = ARENA;
	return arena + below(w, ARENA - n + 1) * page;
}

static int protection(struct worker *w)
{
	static const int all[] = {
		PROT_NONE, PROT_READ, PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE,
		PROT_READ | PROT_EXEC, PROT_READ | PROT_WRITE | PROT_EXEC, PROT_WRITE, PROT_EXEC,
	};

	if (usual(w))
		return chance(w, 70) ? PROT_READ | PROT_WRITE : PROT_READ;
	/* The rare ones rarely: PROT_EXEC alone takes a key where there are keys. */
	return chance(w, 80) ? all[below(w, 6)] : all[below(w, 10)];
}

static void keep_stray(struct worker *w, char *at, long pages)
{
	long i = below(w, STRAYS);

	if (at >= arena && at < arena + ARENA * page)
		return;
	if (w->strays[i].at)
		CALL(w, K_MUNMAP, SYS_munmap, w->strays[i].at, w->strays[i].pages * page, 0, 0, 0, 0);
	w->strays[i].at = at;
	w->strays[i].pages = pages;
}

static void forget_stray(struct worker *w, char *at)
{
	for (long i = 0; i < STRAYS; i++)
		if (w->strays[i].at == at)
			w->strays[i].at = NULL;
}

static int map_flags(struct worker *w, int private)
{
	int flags = 0;

	if (usual(w))
		return private ? MAP_NORESERVE : 0;
	if (private && chance(w, 55))
		flags |= MAP_NORESERVE;
	if (chance(w, 5))
		flags |= MAP_STACK;
	if (chance(w, 2))
		flags |= MAP_GROWSDOWN;
	if (chance(w, 6))
		flags |= MAP_POPULATE;
	if (chance(w, 4))
		flags |= MAP_LOCKED;
	if (chance(w, 2))
		flags |= MAP_NONBLOCK | MAP_DENYWRITE;
	return flags;
}

static void do_mmap(struct worker *w)
{
	long pages = length(w), pgoff = 0;
	char *at = arena + below(w, ARENA - pages + 1) * page, *got;
	int prot = protection(w), flags, fd = -1;
	long how = below(w, 100), place = below(w, 100);

	if (usual(w)) {
		how = 0;
		place = chance(w, 80) ? 0 : place;
	}
	if (how < 62) {
		flags = MAP_PRIVATE | MAP_ANONYMOUS;
	} else if (how < 70) {
		flags = MAP_SHARED | MAP_ANONYMOUS;
	} else if (how < 97) {
		static const int kinds[] = { MAP_PRIVATE, MAP_PRIVATE, MAP_SHARED, MAP_SHARED_VALIDATE };
		const int files[] = { fd_rw, fd_rw, fd_mem, fd_mem, fd_ro, fd_sealed, fd_mem_ro, fd_stacked };

		flags = kinds[below(w, 4)];
		fd = files[below(w, fd_stacked < 0 ? 7 : 8)];
		/* Half of the time linear with the arena, so that neighbours fit together. */
		pgoff = chance(w, 60) ? (at - arena) / (long)page : below(w, FILE_PAGES);
	} else if (how < 98) {
		flags = MAP_DROPPABLE | MAP_ANONYMOUS;
	} else if (how < 99 && fd_secret >= 0) {
		flags = chance(w, 90) ? MAP_SHARED : MAP_PRIVATE;
		fd = fd_secret;
	} else {
		/* /dev/zero: private is anonymous with a file. */
		flags = chance(w, 60) ? MAP_PRIVATE : MAP_SHARED;
		fd = fd_zero_write;
	}
	flags |= map_flags(w, (flags & 3) == MAP_PRIVATE);
	if (place < 66)
		flags |= MAP_FIXED;
	else if (place < 78)
		flags |= MAP_FIXED_NOREPLACE;
	else if (place < 90)
		at = NULL;
	/* else: a hint, taken where it is free */
	if (!at && chance(w, 3))
		pages = 2 * 1024 * 1024 / (long)page;
	got = (char *)CALL(w, K_MMAP, SYS_mmap, at, pages * page, prot, flags, fd, pgoff * page);
	if (got != MAP_FAILED)
		keep_stray(w, got, pages);
}

static void do_munmap(struct worker *w)
{
	long pages;
	char *at = range(w, &pages);

	/* Rarely a whole stretch, so that the arena empties now and then. */
	if (chance(w, 4) && at >= arena && at < arena + ARENA * page) {
		at = arena + below(w, ARENA / 2) * page;
		pages = ARENA / 2;
	}
	/* The heap of this program lies below the first break: untouched. */
	if (at >= break_base && at < break_base + BREAK_PAGES * page)
		pages = 1;
	CALL(w, K_MUNMAP, SYS_munmap, at, pages * page - (chance(w, 10) ? below(w, page) : 0), 0, 0, 0, 0);
	if (pages)
		forget_stray(w, at);
}

static void do_mprotect(struct worker *w)
{
	long pages;
	char *at = range(w, &pages);
	int prot = protection(w);

	if (chance(w, 2))
		prot |= PROT_GROWSDOWN;
	if (chance(w, 8))
		CALL(w, K_PKEY, SYS_pkey_mprotect, at, pages * page, prot, -1, 0, 0);
	else
		CALL(w, K_MPROTECT, SYS_mprotect, at, pages * page, prot, 0, 0, 0);
}

static void do_mremap(struct worker *w)
{
	long pages, grown;
	char *at = range(w, &pages), *to = arena + below(w, ARENA - 12) * page, *got;
	long how = below(w, 100);
	int flags = 0;

	if (at >= break_base && at < break_base + BREAK_PAGES * page)
		return;
	grown = pages;
	if (how < 15) {
		grown = 1 + below(w, pages);
	} else if (how < 40) {
		grown = pages + 1 + below(w, 5);
		flags = chance(w, 50) ? MREMAP_MAYMOVE : 0;
	} else if (how < 75) {
		flags = MREMAP_MAYMOVE | MREMAP_FIXED;
		if (chance(w, 25))
			grown = 1 + below(w, 10);
	} else if (how < 88) {
		flags = MREMAP_MAYMOVE | MREMAP_DONTUNMAP | (chance(w, 60) ? MREMAP_FIXED : 0);
	} else if (how < 92) {
		pages = 0;
		grown = length(w);
		flags = MREMAP_MAYMOVE | (chance(w, 50) ? MREMAP_FIXED : 0);
	} else {
		flags = MREMAP_MAYMOVE;
		grown = pages + below(w, 12);
	}
	got = (char *)CALL(w, K_MREMAP, SYS_mremap, at, pages * page, grown * page, flags, to, 0);
	if (got == MAP_FAILED)
		return;
	if (got != at && !(flags & MREMAP_DONTUNMAP) && pages)
		forget_stray(w, at);
	keep_stray(w, got, grown);
}

static const int advices[] = {
	MADV_NORMAL, MADV_SEQUENTIAL, MADV_RANDOM, MADV_DONTFORK, MADV_DOFORK, MADV_WIPEONFORK, MADV_KEEPONFORK,
	MADV_DONTDUMP, MADV_DODUMP, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_MERGEABLE, MADV_UNMERGEABLE,
	/* Changes for the pages, not for the VMAs; the rarer half. */
	MADV_DONTNEED, MADV_FREE, MADV_COLD, MADV_PAGEOUT, MADV_WILLNEED, MADV_POPULATE_READ, MADV_POPULATE_WRITE,
	ADVICE_GUARD_INSTALL, ADVICE_GUARD_REMOVE, MADV_REMOVE,
};

static void do_madvise(struct worker *w)
{
	long pages;
	char *at = range(w, &pages);
	int advice = advices[chance(w, 75) ? below(w, 13) : below(w, sizeof(advices) / sizeof(advices[0]))];

	if (usual(w))
		advice = chance(w, 50) ? MADV_DONTDUMP : MADV_DODUMP;
	CALL(w, K_MADVISE, SYS_madvise, at, pages * page, advice, 0, 0, 0);
}

static void do_process_madvise(struct worker *w)
{
	long pages;
	char *at = range(w, &pages);
	struct { void *base; size_t size; } part = { at, pages * page };
	int self = syscall(SYS_pidfd_open, getpid(), 0);

	if (self < 0)
		return;
	CALL(w, K_PROCESS_MADVISE, SYS_process_madvise, self, &part, 1,
	     advices[usual(w) ? 7 + below(w, 2) : below(w, 20)], 0, 0);
	close(self);
}

static void do_mlock(struct worker *w)
{
	long pages;
	char *at = range(w, &pages);

	CALL(w, K_MLOCK, SYS_mlock, at, pages * page, 0, 0, 0, 0);
}

static void do_mlock2(struct worker *w)
{
	long pages;
	char *at = range(w, &pages);

	CALL(w, K_MLOCK2, SYS_mlock2, at, pages * page, usual(w) || below(w, 2), 0, 0, 0);
}

static void do_munlock(struct worker *w)
{
	long pages;
	char *at = range(w, &pages);

	CALL(w, K_MUNLOCK, SYS_munlock, at, pages * page, 0, 0, 0, 0);
}

static void do_mlockall(struct worker *w)
{
	static const int modes[] = { MCL_FUTURE, MCL_FUTURE | MCL_ONFAULT, MCL_CURRENT | MCL_ONFAULT, MCL_CURRENT };

	CALL(w, K_MLOCKALL, SYS_mlockall, modes[below(w, 4)], 0, 0, 0, 0, 0);
}

static void do_munlockall(struct worker *w)
{
	CALL(w, K_MUNLOCKALL, SYS_munlockall, 0, 0, 0, 0, 0, 0);
}

static void do_brk(struct worker *w)
{
	/* Never below the break of the start: what lies there belongs to the C library. Above all a page is mapped. */
	if (chance(w, 4)) {
		CALL(w, K_BRK, SYS_brk, break_base + (BREAK_PAGES + 2) * page, 0, 0, 0, 0, 0);
		return;
	}
	CALL(w, K_BRK, SYS_brk, break_base + below(w, BREAK_PAGES) * page + (chance(w, 30) ? below(w, page) : 0),
	     0, 0, 0, 0, 0);
}

static void do_mbind(struct worker *w)
{
	static const int modes[] = { 0, 1, 2, 3, 4, 5 };
	long pages;
	char *at = range(w, &pages);
	unsigned long node = 1;
	int mode = modes[usual(w) ? below(w, 2) * 2 : below(w, 6)];
	/* DEFAULT and LOCAL take no nodes. */
	int bare = mode == 0 || mode == 4;

	CALL(w, K_MBIND, SYS_mbind, at, pages * page, mode, bare ? NULL : &node, bare ? 0 : 64, 0);
}

static void do_home(struct worker *w)
{
	long pages;
	char *at = range(w, &pages);

	/* Only MPOL_BIND (2) and MPOL_PREFERRED_MANY (5) have a home. */
	if (chance(w, 80)) {
		unsigned long node = 1;

		CALL(w, K_MBIND, SYS_mbind, at, pages * page, chance(w, 55) ? 2 : 3, &node, 64, 0);
	}
	CALL(w, K_HOME, SYS_set_mempolicy_home_node, at, pages * page, 0, 0, 0, 0);
}

static void do_personality(struct worker *w)
{
	enum { READS_EXECUTE = 0x0400000 };	/* READ_IMPLIES_EXEC */

	CALL(w, K_PERSONALITY, SYS_personality, READS_EXECUTE, 0, 0, 0, 0, 0);
	do_mmap(w);
	do_mprotect(w);
	CALL(w, K_PERSONALITY, SYS_personality, 0, 0, 0, 0, 0, 0);
}

/* For ever: children only. */
static void do_mdwe(struct worker *w)
{
	char *at = arena + below(w, ARENA - 4) * page;

	if (!w->depth)
		return;
	CALL(w, K_PRCTL_MDWE, SYS_prctl, PR_SET_MDWE, 1, 0, 0, 0, 0);
	CALL(w, K_MMAP, SYS_mmap, at, 2 * page, PROT_READ | PROT_WRITE | PROT_EXEC,
	     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	CALL(w, K_MPROTECT, SYS_mprotect, at, page, PROT_READ | PROT_EXEC, 0, 0, 0);
}

/* A ring is a file map that may not grow; the context's number is its address. */
static void do_aio(struct worker *w)
{
	unsigned long ring = 0;

	if (CALL(w, K_AIO, SYS_io_setup, 1 + below(w, 64), &ring, 0, 0, 0, 0) == 0)
		keep_stray(w, (char *)ring, 1);
}

/* Two huge pages, none of which need be there: what a cut inside one answers. */
static void do_hugetlb(struct worker *w)
{
	const long pages = 2 * 2 * 1024 * 1024 / (long)page;
	char *got = (char *)CALL(w, K_MMAP, SYS_mmap, NULL, pages * page, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_HUGETLB |
				 (chance(w, 60) ? MAP_LOCKED : 0), -1, 0);

	if (got == MAP_FAILED)
		return;
	CALL(w, K_MPROTECT, SYS_mprotect, got, (chance(w, 50) ? pages / 2 : 1) * page, PROT_READ, 0, 0, 0);
	CALL(w, K_MUNMAP, SYS_munmap, got, page, 0, 0, 0, 0);
	CALL(w, K_MREMAP, SYS_mremap, got, page, 2 * page, MREMAP_MAYMOVE, 0, 0);
	CALL(w, K_MUNMAP, SYS_munmap, got, pages * page, 0, 0, 0, 0);
}

static void do_mseal(struct worker *w)
{
	long first = below(w, VAULT), pages = 1 + below(w, 3);
	char *at = vault + first * page;

	if (first + pages > VAULT)
		pages = VAULT - first;
	/* The vault fills up: a sealed page stays for ever, so the first process seals little. */
	if (chance(w, 40))
		CALL(w, K_MMAP, SYS_mmap, at, pages * page, chance(w, 50) ? PROT_READ | PROT_WRITE : PROT_READ,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
	else if (chance(w, 20))
		CALL(w, K_MPROTECT, SYS_mprotect, at, pages * page, protection(w), 0, 0, 0);
	else if (chance(w, 10))
		CALL(w, K_PKEY, SYS_pkey_mprotect, at, pages * page, protection(w), -1, 0, 0);
	else if (chance(w, 10))
		CALL(w, K_MUNMAP, SYS_munmap, at, pages * page, 0, 0, 0, 0);
	else if (chance(w, 15))
		CALL(w, K_MREMAP, SYS_mremap, at, pages * page, pages * page, MREMAP_MAYMOVE | MREMAP_FIXED, arena, 0);
	else if (chance(w, 20))
		CALL(w, K_MADVISE, SYS_madvise, at, pages * page, chance(w, 50) ? MADV_DONTFORK : MADV_WIPEONFORK,
		     0, 0, 0);
	else if (w->depth || chance(w, 5))
		CALL(w, K_MSEAL, SYS_mseal, at, pages * page, 0, 0, 0, 0);
}

static void do_shmat(struct worker *w)
{
	long i = below(w, SEGMENTS), place = below(w, 100);
	char *at = NULL;
	int flags = chance(w, 30) ? SHM_RDONLY : 0, id;

	if (w->segments[i]) {
		CALL(w, K_SHMDT, SYS_shmdt, w->segments[i], 0, 0, 0, 0, 0);
		w->segments[i] = NULL;
		return;
	}
	id = shmget(IPC_PRIVATE, (1 + below(w, 4)) * page, IPC_CREAT | 0600);
	if (id < 0)
		return;
	if (place < 70) {
		at = arena + below(w, ARENA - 4) * page;
		flags |= place < 50 ? SHM_REMAP : 0;
	}
	w->segments[i] = (void *)CALL(w, K_SHMAT, SYS_shmat, id, at, flags, 0, 0, 0);
	if (w->segments[i] == (void *)-1)
		w->segments[i] = NULL;
	/* Gone with its last attachment, whatever becomes of this process. */
	shmctl(id, IPC_RMID, NULL);
}

static void do_remap_file(struct worker *w)
{
	long pages;
	char *at = range(w, &pages);

	/* It wants a shared file map. A page of three goes elsewhere in the file and comes back: they join again. */
	if (chance(w, 60)) {
		long first = below(w, FILE_PAGES), which = below(w, 3);

		at = arena + below(w, ARENA - 8) * page;
		CALL(w, K_MMAP, SYS_mmap, at, 3 * page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
		     chance(w, 50) ? fd_rw : fd_mem, first * page);
		CALL(w, K_REMAP_FILE, SYS_remap_file_pages, at + which * page, page, 0, FILE_PAGES + 5, 0, 0);
		CALL(w, K_REMAP_FILE, SYS_remap_file_pages, at + which * page, page, 0, first + which, 0, 0);
		return;
	}
	CALL(w, K_REMAP_FILE, SYS_remap_file_pages, at, pages * page, 0, below(w, FILE_PAGES), 0, 0);
}

static void do_name(struct worker *w)
{
	static const char *const words[] = { "alpha", "beta", NULL };
	long pages;
	char *at = range(w, &pages);

	CALL(w, K_PRCTL_NAME, SYS_prctl, PR_SET_VMA, 0, at, pages * page, words[below(w, 3)], 0);
}

static void do_ksm(struct worker *w)
{
	CALL(w, K_PRCTL_KSM, SYS_prctl, PR_SET_MEMORY_MERGE, below(w, 2), 0, 0, 0, 0);
}

static int open_uffd(void)
{
	/* A missing page raises SIGBUS: there is no handler to wait for. */
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_SIGBUS };
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (fd < 0 || ioctl(fd, UFFDIO_API, &api))
		die("no userfaultfd");
	return fd;
}

static void do_uffd(struct worker *w)
{
	static const uint64_t modes[] = {
		UFFDIO_REGISTER_MODE_WP, UFFDIO_REGISTER_MODE_WP, UFFDIO_REGISTER_MODE_MISSING,
		UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP, 4 /* minor faults: shared memory */, 0, 8,
	};
	struct uffdio_register enroll;
	long pages;
	/* Whose a refused call was nobody can tell from outside: the second context is rare. */
	int fd = fd_uffd[chance(w, 2)];
	char *at = range(w, &pages);

	memset(&enroll, 0, sizeof(enroll));
	enroll.range.start = (uint64_t)(uintptr_t)at;
	enroll.range.len = pages * page;
	enroll.mode = modes[usual(w) ? below(w, 2) : below(w, 7)];
	if (chance(w, 5))
		CALL(w, K_MMAP, SYS_mmap, at, pages * page, PROT_READ, MAP_SHARED | MAP_FIXED, fd_mem_ro, 0);
	if (chance(w, 55))
		CALL(w, K_UFFD, SYS_ioctl, fd, UFFDIO_REGISTER, &enroll, 0, 0, 0);
	else
		CALL(w, K_UFFD, SYS_ioctl, fd, UFFDIO_UNREGISTER, &enroll.range, 0, 0, 0);
	/* The last to let go of a context takes it off every VMA. */
	if (!w->depth && chance(w, 1)) {
		close(fd_uffd[1]);
		fd_uffd[1] = open_uffd();
	}
}

static void do_touch(struct worker *w)
{
	long pages;
	char *at = range(w, &pages);
	int writing = chance(w, 70);

	for (long i = 0; i < pages; i++)
		if (chance(w, 70))
			touch(w, at + i * page, writing);
}

static void do_rlimit(struct worker *w)
{
	static const int which[] = { RLIMIT_AS, RLIMIT_DATA, RLIMIT_MEMLOCK, RLIMIT_STACK };
	int resource = which[below(w, 4)];
	struct rlimit old, tight;
	char *at = arena + below(w, ARENA - 4) * page;

	/* Only the soft one, given back at once; the process is alone with it. */
	if (threads > 1 || getrlimit(resource, &old))
		return;
	tight = old;
	tight.rlim_cur = 1 << 20;
	if (resource == RLIMIT_MEMLOCK)
		tight.rlim_cur = chance(w, 35) ? 0 : below(w, 16) * page;
	else if (resource == RLIMIT_DATA && chance(w, 30))
		tight.rlim_cur = 0;
	if (setrlimit(resource, &tight))
		return;
	CALL(w, K_MMAP, SYS_mmap, at, 4 * page, PROT_READ | PROT_WRITE,
	     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	CALL(w, K_BRK, SYS_brk, break_base + (1 + below(w, BREAK_PAGES - 1)) * page, 0, 0, 0, 0, 0);
	CALL(w, K_MREMAP, SYS_mremap, at, 2 * page, 6 * page, MREMAP_MAYMOVE | MREMAP_FIXED, arena, 0);
	CALL(w, K_MLOCK, SYS_mlock, at, 3 * page, 0, 0, 0, 0);
	if (resource == RLIMIT_MEMLOCK) {
		CALL(w, K_MLOCK2, SYS_mlock2, at, 5 * page, 1, 0, 0, 0);
		CALL(w, K_MMAP, SYS_mmap, at, 3 * page, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_LOCKED, -1, 0);
		CALL(w, K_MLOCKALL, SYS_mlockall, MCL_CURRENT | MCL_ONFAULT, 0, 0, 0, 0, 0);
		CALL(w, K_MUNLOCKALL, SYS_munlockall, 0, 0, 0, 0, 0, 0);
	}
	setrlimit(resource, &old);
}

/* Arguments that the kernel refuses, each for a reason of its own. */
static void do_invalid(struct worker *w)
{
	const long rw = PROT_READ | PROT_WRITE, anon = MAP_PRIVATE | MAP_ANONYMOUS;
	char *at = arena + below(w, ARENA - 8) * page, *odd = at + 1 + below(w, page - 1);
	/* Past the end of any address space: what could be granted would be granted, and locked. */
	const long far = 1l << 62, huge = 1l << 56;
	long node = 1;

	switch (below(w, 56)) {
	case 0: CALL(w, K_MMAP, SYS_mmap, at, 0, rw, anon | MAP_FIXED, -1, 0); break;		/* EINVAL */
	case 1: CALL(w, K_MMAP, SYS_mmap, odd, page, rw, anon | MAP_FIXED, -1, 0); break;	/* EINVAL */
	case 2: CALL(w, K_MMAP, SYS_mmap, at, page, rw, MAP_PRIVATE, fd_rw, 1); break;		/* EINVAL */
	case 3: CALL(w, K_MMAP, SYS_mmap, at, page, rw, MAP_ANONYMOUS, -1, 0); break;		/* EINVAL */
	case 4: CALL(w, K_MMAP, SYS_mmap, at, page, rw, MAP_PRIVATE, 9999, 0); break;		/* EBADF */
	case 5: CALL(w, K_MMAP, SYS_mmap, at, page, rw, MAP_SHARED, fd_ro, 0); break;		/* EACCES */
	case 6: CALL(w, K_MMAP, SYS_mmap, NULL, huge, rw, anon, -1, 0); break;		/* ENOMEM */
	case 7: CALL(w, K_MMAP, SYS_mmap, far, page, rw, anon | MAP_FIXED, -1, 0); break;	/* ENOMEM */
	case 8: CALL(w, K_MMAP, SYS_mmap, NULL, 2 * page, rw, MAP_SHARED, fd_rw, -page); break;	/* EOVERFLOW */
	case 9: CALL(w, K_MMAP, SYS_mmap, at, page, rw, MAP_SHARED_VALIDATE | 1 << 21, fd_rw, 0); break;
	case 10: CALL(w, K_MMAP, SYS_mmap, at, page, rw, MAP_PRIVATE, fd_dir, 0); break;	/* ENODEV */
	case 11: CALL(w, K_MMAP, SYS_mmap, at, page, rw, MAP_SHARED, fd_sealed, 0); break;	/* EPERM */
	case 12: CALL(w, K_MMAP, SYS_mmap, arena, ARENA * page, rw, anon | MAP_FIXED_NOREPLACE, -1, 0); break;
	case 13: CALL(w, K_MMAP, SYS_mmap, NULL, 1 - page, rw, anon, -1, 0); break;		/* ENOMEM */
	case 14: CALL(w, K_MUNMAP, SYS_munmap, at, 0, 0, 0, 0, 0); break;			/* EINVAL */
	case 15: CALL(w, K_MUNMAP, SYS_munmap, odd, page, 0, 0, 0, 0); break;			/* EINVAL */
	case 16: CALL(w, K_MUNMAP, SYS_munmap, far, page, 0, 0, 0, 0); break;			/* EINVAL */
	case 17: CALL(w, K_MUNMAP, SYS_munmap, at, -page, 0, 0, 0, 0); break;			/* EINVAL */
	case 18: CALL(w, K_MPROTECT, SYS_mprotect, odd, page, rw, 0, 0, 0); break;		/* EINVAL */
	case 19: CALL(w, K_MPROTECT, SYS_mprotect, at, page, 0x100, 0, 0, 0); break;		/* EINVAL */
	case 20: CALL(w, K_MPROTECT, SYS_mprotect, at, page, PROT_GROWSDOWN | PROT_GROWSUP, 0, 0, 0); break;
	case 21: CALL(w, K_MPROTECT, SYS_mprotect, at, 0, rw, 0, 0, 0); break;			/* 0 */
	case 22: CALL(w, K_MPROTECT, SYS_mprotect, arena - 4 * page, 8 * page, rw, 0, 0, 0); break; /* ENOMEM */
	case 23: CALL(w, K_MREMAP, SYS_mremap, at, page, 0, MREMAP_MAYMOVE, 0, 0); break;	/* EINVAL */
	case 24: CALL(w, K_MREMAP, SYS_mremap, odd, page, page, MREMAP_MAYMOVE, 0, 0); break;	/* EINVAL */
	case 25: CALL(w, K_MREMAP, SYS_mremap, at, page, page, 64, 0, 0); break;		/* EINVAL */
	case 26: CALL(w, K_MREMAP, SYS_mremap, at, page, page, MREMAP_FIXED, arena, 0); break;	/* EINVAL */
	case 27: CALL(w, K_MREMAP, SYS_mremap, at, 3 * page, 3 * page, MREMAP_MAYMOVE | MREMAP_FIXED,
		      at + page, 0); break;							/* EINVAL */
	case 28: CALL(w, K_MREMAP, SYS_mremap, at, page, page, MREMAP_MAYMOVE | MREMAP_FIXED, odd, 0); break;
	case 29: CALL(w, K_MREMAP, SYS_mremap, arena - 9 * page, page, page, MREMAP_MAYMOVE, 0, 0); break;
	case 30: CALL(w, K_MREMAP, SYS_mremap, at, page, 2 * page, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, 0, 0); break;
	case 31: CALL(w, K_MREMAP, SYS_mremap, at, page, huge, MREMAP_MAYMOVE, 0, 0); break;	/* ENOMEM */
	case 32: CALL(w, K_MREMAP, SYS_mremap, at, 0, page, MREMAP_MAYMOVE, 0, 0); break;	/* EINVAL */
	case 33: CALL(w, K_MADVISE, SYS_madvise, at, page, 9999, 0, 0, 0); break;		/* EINVAL */
	case 34: CALL(w, K_MADVISE, SYS_madvise, odd, page, MADV_DONTFORK, 0, 0, 0); break;	/* EINVAL */
	case 35: CALL(w, K_MADVISE, SYS_madvise, arena - 8 * page, 16 * page, MADV_DONTDUMP, 0, 0, 0); break;
	case 36: CALL(w, K_MLOCK2, SYS_mlock2, at, page, 8, 0, 0, 0); break;			/* EINVAL */
	case 37: CALL(w, K_MLOCK, SYS_mlock, arena - 8 * page, 16 * page, 0, 0, 0, 0); break;	/* ENOMEM */
	case 38: CALL(w, K_MUNLOCK, SYS_munlock, at, -page, 0, 0, 0, 0); break;			/* EINVAL */
	case 39: CALL(w, K_MLOCKALL, SYS_mlockall, MCL_ONFAULT, 0, 0, 0, 0, 0); break;		/* EINVAL */
	case 40: CALL(w, K_MBIND, SYS_mbind, at, page, 77, &node, 64, 0); break;		/* EINVAL */
	case 41: CALL(w, K_MBIND, SYS_mbind, arena - 8 * page, 16 * page, 2, &node, 64, 0); break; /* EFAULT */
	case 42: CALL(w, K_MSEAL, SYS_mseal, arena - 8 * page, 4 * page, 0, 0, 0, 0); break;	/* ENOMEM */
	case 43: CALL(w, K_MSEAL, SYS_mseal, odd, page, 0, 0, 0, 0); break;			/* EINVAL */
	case 44: CALL(w, K_BRK, SYS_brk, page, 0, 0, 0, 0, 0); break;				/* the old break */
	case 45: CALL(w, K_SHMAT, SYS_shmat, -1, at, 0, 0, 0, 0); break;			/* EINVAL */
	case 46: CALL(w, K_SHMDT, SYS_shmdt, at + 1, 0, 0, 0, 0, 0); break;			/* EINVAL */
	case 47: case 48: CALL(w, K_PKEY, SYS_pkey_mprotect, at, page, rw, 77, 0, 0); break;	/* EINVAL */
	case 49: case 50: {
		struct { void *base; size_t size; } part = { chance(w, 50) ? odd : at, page };
		int self = syscall(SYS_pidfd_open, getpid(), 0);

		CALL(w, K_PROCESS_MADVISE, SYS_process_madvise, self, &part, 1,
		     part.base == odd ? MADV_DONTDUMP : 9999, 0, 0);				/* EINVAL */
		close(self);
		break;
	}
	case 51: case 52: case 53:
		CALL(w, K_MMAP, SYS_mmap, at, 2 * page, PROT_READ, MAP_SHARED | MAP_FIXED, fd_ro, 0);
		if (chance(w, 50))
			CALL(w, K_MPROTECT, SYS_mprotect, at, page, rw, 0, 0, 0);		/* EACCES */
		else
			CALL(w, K_PKEY, SYS_pkey_mprotect, at, page, rw, -1, 0, 0);		/* EACCES */
		break;
	case 54: CALL(w, K_MMAP, SYS_mmap, at, page, rw, MAP_SHARED_VALIDATE | 1 << 21, fd_rw, 0); break;
	case 55: CALL(w, K_MUNLOCK, SYS_munlock, at, -page, 0, 0, 0, 0); break;			/* EINVAL */
	}
}

enum { HEAL_PROTECT, HEAL_PKEY, HEAL_ADVISE, HEAL_PROCESS, HEAL_LOCK, HEAL_LOCK2, HEAL_UNLOCK, HEAL_BIND, HEAL_HOME,
       HEALS, HEAL_SEAL, HEAL_UFFD };

/* The same change for three neighbours in any order: the last ones merge to the left, to the right, with both. */
static void heal(struct worker *w, int how)
{
	static const int orders[][3] = { { 0, 2, 1 }, { 0, 2, 1 }, { 1, 0, 2 }, { 2, 1, 0 }, { 0, 1, 2 } };
	const int *order = orders[below(w, 5)];
	long each = 1 + below(w, 3), size = each * page;
	/* What is sealed stays: where the kernel puts it, not in the arena. */
	char *base = how == HEAL_SEAL ? NULL : arena + below(w, ARENA - 26) * page;
	/* Memory that can be written is populated when it is locked, and may get anon_vmas that do not fit. */
	int prot = how == HEAL_LOCK || chance(w, how == HEAL_SEAL ? 60 : 30) ? PROT_READ : PROT_READ | PROT_WRITE;
	int fixed = (base ? MAP_FIXED : 0) | (how == HEAL_UNLOCK ? MAP_LOCKED : 0);
	unsigned long node = 1;
	int self = how == HEAL_PROCESS ? (int)syscall(SYS_pidfd_open, getpid(), 0) : -1;

	base = (char *)CALL(w, K_MMAP, SYS_mmap, base, 3 * size, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | fixed,
			    -1, 0);
	if (base == MAP_FAILED)
		base = vault;
	if (how == HEAL_HOME)
		CALL(w, K_MBIND, SYS_mbind, base, 3 * size, 2, &node, 64, 0);
	for (int i = 0; i < 3; i++) {
		char *at = base + order[i] * size;
		struct { void *base; size_t size; } part = { at, size };
		struct uffdio_register enroll = {
			.range = { (uintptr_t)at, size }, .mode = UFFDIO_REGISTER_MODE_WP,
		};

		switch (how) {
		case HEAL_PROTECT: CALL(w, K_MPROTECT, SYS_mprotect, at, size, PROT_READ, 0, 0, 0); break;
		case HEAL_PKEY: CALL(w, K_PKEY, SYS_pkey_mprotect, at, size, PROT_READ, -1, 0, 0); break;
		case HEAL_ADVISE: CALL(w, K_MADVISE, SYS_madvise, at, size, MADV_DONTDUMP, 0, 0, 0); break;
		case HEAL_PROCESS:
			CALL(w, K_PROCESS_MADVISE, SYS_process_madvise, self, &part, 1, MADV_DONTDUMP, 0, 0);
			break;
		case HEAL_LOCK: CALL(w, K_MLOCK, SYS_mlock, at, size, 0, 0, 0, 0); break;
		case HEAL_LOCK2: CALL(w, K_MLOCK2, SYS_mlock2, at, size, 1, 0, 0, 0); break;
		case HEAL_UNLOCK: CALL(w, K_MUNLOCK, SYS_munlock, at, size, 0, 0, 0, 0); break;
		case HEAL_BIND: CALL(w, K_MBIND, SYS_mbind, at, size, 2, &node, 64, 0); break;
		case HEAL_HOME: CALL(w, K_HOME, SYS_set_mempolicy_home_node, at, size, 0, 0, 0, 0); break;
		case HEAL_SEAL: CALL(w, K_MSEAL, SYS_mseal, at, size, 0, 0, 0, 0); break;
		case HEAL_UFFD:
			CALL(w, K_UFFD, SYS_ioctl, fd_uffd[chance(w, 10)], UFFDIO_REGISTER, &enroll, 0, 0, 0);
			break;
		}
	}
	/* All of it again: nothing is left to do. Then as it was: one change in place. */
	switch (how) {
	case HEAL_PKEY:
		CALL(w, K_PKEY, SYS_pkey_mprotect, base, 3 * size, PROT_READ, -1, 0, 0);
		CALL(w, K_PKEY, SYS_pkey_mprotect, base, 3 * size, PROT_READ | PROT_WRITE, -1, 0, 0);
		break;
	case HEAL_PROCESS: {
		struct { void *base; size_t size; } whole = { base, 3 * size };

		CALL(w, K_PROCESS_MADVISE, SYS_process_madvise, self, &whole, 1, MADV_DODUMP, 0, 0);
		close(self);
		break;
	}
	case HEAL_LOCK: CALL(w, K_MLOCK, SYS_mlock, base, 3 * size, 0, 0, 0, 0); break;
	case HEAL_LOCK2:
		CALL(w, K_MLOCK2, SYS_mlock2, base, 3 * size, 0, 0, 0, 0);
		CALL(w, K_MLOCK2, SYS_mlock2, base, 3 * size, 0, 0, 0, 0);
		CALL(w, K_MUNLOCK, SYS_munlock, base, 3 * size, 0, 0, 0, 0);
		break;
	case HEAL_BIND: CALL(w, K_MBIND, SYS_mbind, base, 3 * size, 0, NULL, 0, 0); break;
	case HEAL_HOME: CALL(w, K_HOME, SYS_set_mempolicy_home_node, base, 3 * size, 0, 0, 0, 0); break;
	case HEAL_SEAL:
		CALL(w, K_MSEAL, SYS_mseal, base, 3 * size, 0, 0, 0, 0);
		CALL(w, K_MPROTECT, SYS_mprotect, base, size, PROT_NONE, 0, 0, 0);
		CALL(w, K_PKEY, SYS_pkey_mprotect, base, size, PROT_NONE, -1, 0, 0);
		CALL(w, K_MUNMAP, SYS_munmap, base + size, size, 0, 0, 0, 0);
		CALL(w, K_MREMAP, SYS_mremap, base, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, arena, 0);
		CALL(w, K_MADVISE, SYS_madvise, base, size, chance(w, 50) ? MADV_DONTFORK : MADV_WIPEONFORK, 0, 0, 0);
		{
			struct { void *base; size_t size; } part = { base, size };

			self = syscall(SYS_pidfd_open, getpid(), 0);
			CALL(w, K_PROCESS_MADVISE, SYS_process_madvise, self, &part, 1, MADV_DONTFORK, 0, 0);
			close(self);
		}
		/* One that is sealed as a whole. */
		base = (char *)CALL(w, K_MMAP, SYS_mmap, NULL, size, PROT_NONE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
		if (base != MAP_FAILED)
			CALL(w, K_MSEAL, SYS_mseal, base, size, 0, 0, 0, 0);
		break;
	case HEAL_UFFD:
		CALL(w, K_MREMAP, SYS_mremap, base, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, base + 16 * page, 0);
		CALL(w, K_MUNMAP, SYS_munmap, base, 20 * page, 0, 0, 0, 0);
		break;
	}
}

static void do_heal_uffd(struct worker *w)
{
	if (fd_uffd[0] >= 0)
		heal(w, HEAL_UFFD);
}

static void do_heal(struct worker *w)
{
	heal(w, below(w, HEALS));
}

/* For ever: children only. */
static void do_heal_sealed(struct worker *w)
{
	if (w->depth)
		heal(w, HEAL_SEAL);
}

/* A faulted piece goes away and comes back beside one that nobody has touched. */
static void do_return(struct worker *w)
{
	const long flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
	long size = (1 + below(w, 3)) * page;
	char *at = arena + below(w, ARENA - 24) * page, *away = at + 16 * page;

	CALL(w, K_MMAP, SYS_mmap, at, size, PROT_READ | PROT_WRITE, flags, -1, 0);
	touch(w, at, 1);
	CALL(w, K_MREMAP, SYS_mremap, at, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, away, 0);
	CALL(w, K_MMAP, SYS_mmap, at + size, size, PROT_READ | PROT_WRITE, flags, -1, 0);
	CALL(w, K_MREMAP, SYS_mremap, away, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, at, 0);
	/* Room above: it grows where it is, or moves. */
	CALL(w, K_MUNMAP, SYS_munmap, at + size, 6 * page, 0, 0, 0, 0);
	CALL(w, K_MREMAP, SYS_mremap, at, size, size + (1 + below(w, 4)) * page, below(w, 2) * MREMAP_MAYMOVE, 0, 0);
}

/* Between two equal maps one opens that joins both, or one; in the middle a move does the same. */
static void do_bridge(struct worker *w)
{
	const long flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
	long size = (1 + below(w, 3)) * page;
	char *at = arena + below(w, ARENA - 24) * page, *away = at + 16 * page;

	CALL(w, K_MMAP, SYS_mmap, at, 3 * size, PROT_READ | PROT_WRITE, flags, -1, 0);
	if (chance(w, 30))
		touch(w, at, 1);
	CALL(w, K_MREMAP, SYS_mremap, at + size, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, away, 0);
	CALL(w, K_MREMAP, SYS_mremap, away, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, at + size, 0);
}

/* System V segments have a close hook: pieces of one that a merge would delete stay. */
static void do_segment(struct worker *w)
{
	char *at = arena + below(w, ARENA - 24) * page, *away = at + 16 * page;
	int id = shmget(IPC_PRIVATE, 6 * page, IPC_CREAT | 0600);
	long got;

	if (id < 0)
		return;
	got = CALL(w, K_SHMAT, SYS_shmat, id, at, SHM_REMAP, 0, 0, 0);
	shmctl(id, IPC_RMID, NULL);
	if (got == -1)
		return;
	CALL(w, K_MADVISE, SYS_madvise, at + page, 2 * page, MADV_DONTDUMP, 0, 0, 0);
	CALL(w, K_MADVISE, SYS_madvise, at, page, MADV_DONTDUMP, 0, 0, 0);
	CALL(w, K_MADVISE, SYS_madvise, at, (1 + below(w, 5)) * page, MADV_DODUMP, 0, 0, 0);
	CALL(w, K_MREMAP, SYS_mremap, at + 4 * page, page, page, MREMAP_MAYMOVE | MREMAP_FIXED, away, 0);
	CALL(w, K_MREMAP, SYS_mremap, away, page, page, MREMAP_MAYMOVE | MREMAP_FIXED, at + 4 * page, 0);
	CALL(w, K_SHMDT, SYS_shmdt, at, 0, 0, 0, 0, 0);
}

/* A map that grows down, and a touch below it. */
static void do_grow(struct worker *w)
{
	char *at = arena - (MARGIN - 10) * page;
	const long flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_GROWSDOWN;

	CALL(w, K_MMAP, SYS_mmap, at, 2 * page, PROT_READ | PROT_WRITE, flags, -1, 0);
	if (chance(w, 60))
		touch(w, at, 1);
	for (long i = 0; i < 3; i++)
		touch(w, at - (i + 1) * page, 1);
	CALL(w, K_MUNMAP, SYS_munmap, at - 10 * page, 12 * page, 0, 0, 0, 0);
}

static void do_guard(struct worker *w)
{
	char *at = arena + below(w, ARENA - 8) * page;

	/* What is installed marks the whole VMA; what is cut off and joins again carries the mark on. */
	CALL(w, K_MADVISE, SYS_madvise, at, page, ADVICE_GUARD_INSTALL, 0, 0, 0);
	CALL(w, K_MPROTECT, SYS_mprotect, at + 2 * page, page, PROT_READ, 0, 0, 0);
	CALL(w, K_MMAP, SYS_mmap, at + 2 * page, page, PROT_READ | PROT_WRITE,
	     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
	CALL(w, K_MADVISE, SYS_madvise, at + 3 * page, page, ADVICE_GUARD_INSTALL, 0, 0, 0);
	CALL(w, K_MPROTECT, SYS_mprotect, at, 5 * page, PROT_READ | PROT_WRITE, 0, 0, 0);
}

/* A locked map that becomes writable is populated at once: it takes the anon_vma of what lies beside it. */
static void do_relock(struct worker *w)
{
	const long flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED | MAP_LOCKED;
	char *at = arena + below(w, ARENA - 4) * page;
	int first = chance(w, 50);

	CALL(w, K_MMAP, SYS_mmap, at + first * page, page, PROT_READ | PROT_WRITE | PROT_EXEC, flags, -1, 0);
	CALL(w, K_MMAP, SYS_mmap, at + !first * page, page, PROT_READ, flags, -1, 0);
	CALL(w, K_MPROTECT, SYS_mprotect, at + !first * page, page, PROT_READ | PROT_WRITE, 0, 0, 0);
}

static void do_droppable(struct worker *w)
{
	char *at = arena + below(w, ARENA - 4) * page;

	CALL(w, K_MMAP, SYS_mmap, at, 3 * page, PROT_READ | PROT_WRITE,
	     MAP_DROPPABLE | MAP_ANONYMOUS | MAP_FIXED | (chance(w, 80) ? MAP_LOCKED : 0), -1, 0);
	CALL(w, K_MADVISE, SYS_madvise, at, page, chance(w, 50) ? MADV_KEEPONFORK : MADV_DODUMP, 0, 0, 0);
	CALL(w, K_MLOCK, SYS_mlock, at, 2 * page, 0, 0, 0, 0);
	if (fd_secret >= 0)
		CALL(w, K_MMAP, SYS_mmap, at, page, PROT_READ, (chance(w, 60) ? MAP_PRIVATE : MAP_SHARED) | MAP_FIXED,
		     fd_secret, 0);
}

/* What the kernel maps for every process: little may be done to it, and nothing that would hurt. */
static void do_special(struct worker *w)
{
	if (!vdso.at || !vvar.at)
		return;
	switch (below(w, 7)) {
	case 0: CALL(w, K_MADVISE, SYS_madvise, vvar.at, vvar.size, MADV_DODUMP, 0, 0, 0); break;
	case 1: CALL(w, K_MADVISE, SYS_madvise, vvar.at, vvar.size, MADV_DOFORK, 0, 0, 0); break;
	case 2: CALL(w, K_MLOCK2, SYS_mlock2, vvar.at, vvar.size, 1, 0, 0, 0); break;
	case 3: CALL(w, K_MPROTECT, SYS_mprotect, vdso.at, page, PROT_READ, 0, 0, 0); break;
	case 4: CALL(w, K_MREMAP, SYS_mremap, vdso.at, vdso.size, vdso.size + page, MREMAP_MAYMOVE, 0, 0); break;
	case 5: CALL(w, K_MREMAP, SYS_mremap, vdso.at, vdso.size, vdso.size, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, 0, 0); break;
	case 6: CALL(w, K_MADVISE, SYS_madvise, vdso.at, page, MADV_DONTDUMP, 0, 0, 0); break;
	}
}

/* Everything is locked, unlocked and locked again: what could merge has done so by then. */
static void do_lock_cycle(struct worker *w)
{
	char *at = arena + below(w, ARENA - 3) * page;
	int which = chance(w, 50) ? 5 : 1 + below(w, 6);

	do_mlockall(w);
	do_munlockall(w);
	CALL(w, K_MUNLOCKALL, SYS_munlockall, 0, 0, 0, 0, 0, 0);
	/* Of three neighbours some are locked before the rest, and unlocked before it. */
	CALL(w, K_MMAP, SYS_mmap, at, 3 * page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
	for (int i = 0; i < 3; i++)
		if (which >> i & 1)
			CALL(w, K_MLOCK2, SYS_mlock2, at + i * page, page, 1, 0, 0, 0);
	CALL(w, K_MLOCKALL, SYS_mlockall, MCL_CURRENT | MCL_ONFAULT, 0, 0, 0, 0, 0);
	CALL(w, K_MLOCKALL, SYS_mlockall, MCL_CURRENT | MCL_ONFAULT, 0, 0, 0, 0, 0);
	for (int i = 0; i < 3; i++)
		if (which >> i & 1)
			CALL(w, K_MUNLOCK, SYS_munlock, at + i * page, page, 0, 0, 0, 0);
	CALL(w, K_MUNLOCKALL, SYS_munlockall, 0, 0, 0, 0, 0, 0);
	CALL(w, K_MLOCKALL, SYS_mlockall, MCL_CURRENT | MCL_ONFAULT, 0, 0, 0, 0, 0);
	CALL(w, K_MUNLOCKALL, SYS_munlockall, 0, 0, 0, 0, 0, 0);
}

/* As many VMAs as the process may have, then what needs one more. Only with --fill: else it would take long. */
static void do_brim(struct worker *w)
{
	const long flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
	char *at = arena + below(w, ARENA - 24) * page, *more = brim;
	unsigned long node = 1;
	long spare = below(w, 4);

	if (!brim)
		return;
	CALL(w, K_MMAP, SYS_mmap, at, 5 * page, PROT_READ | PROT_WRITE, flags, -1, 0);
	while (more < brim + BRIM * page &&
	       CALL(w, K_MMAP, SYS_mmap, more, page, PROT_NONE, flags, -1, 0) != -1)
		more += 2 * page;
	CALL(w, K_MUNMAP, SYS_munmap, brim, spare * 2 * page, 0, 0, 0, 0);
	for (int i = 0; i < 3; i++) {
		CALL(w, K_MBIND, SYS_mbind, at + 2 * page, page, 2, &node, 64, 0);
		CALL(w, K_MADVISE, SYS_madvise, at + 2 * page, page, MADV_DONTDUMP, 0, 0, 0);
		CALL(w, K_MPROTECT, SYS_mprotect, at + 2 * page, page, PROT_READ, 0, 0, 0);
		CALL(w, K_MUNMAP, SYS_munmap, at + 2 * page, page, 0, 0, 0, 0);
		CALL(w, K_MLOCK2, SYS_mlock2, at + 2 * page, page, 1, 0, 0, 0);
		CALL(w, K_MREMAP, SYS_mremap, at, page, page, MREMAP_MAYMOVE | MREMAP_FIXED, at + 12 * page, 0);
		CALL(w, K_MREMAP, SYS_mremap, at, 5 * page, 6 * page, MREMAP_MAYMOVE, 0, 0);
		CALL(w, K_MMAP, SYS_mmap, at + 10 * page, page, PROT_NONE, flags, -1, 0);
	}
	CALL(w, K_MUNMAP, SYS_munmap, brim, BRIM * page, 0, 0, 0, 0);
}

static void do_fork(struct worker *w);

struct op {
	const char *name;
	void (*run)(struct worker *w);
	int weight;
};

/* The default weights; a kind with weight 0 comes only when asked for. */
static struct op ops[] = {
	{ "mmap", do_mmap, 260 },	{ "munmap", do_munmap, 110 },	{ "mprotect", do_mprotect, 220 },
	{ "mremap", do_mremap, 90 },	{ "madvise", do_madvise, 120 },	{ "mlock", do_mlock, 14 },
	{ "mlock2", do_mlock2, 10 },	{ "munlock", do_munlock, 24 },	{ "mlockall", do_mlockall, 0 },
	{ "munlockall", do_munlockall, 0 }, { "brk", do_brk, 40 },	{ "mbind", do_mbind, 12 },
	{ "home_node", do_home, 1 },	{ "mseal", do_mseal, 4 },	{ "shm", do_shmat, 8 },
	{ "remap_file_pages", do_remap_file, 2 }, { "process_madvise", do_process_madvise, 4 },
	{ "name", do_name, 2 },		{ "ksm", do_ksm, 0 },		{ "uffd", do_uffd, 0 },
	{ "touch", do_touch, 130 },	{ "rlimit", do_rlimit, 2 },	{ "invalid", do_invalid, 24 },
	{ "personality", do_personality, 0 }, { "mdwe", do_mdwe, 0 },	{ "aio", do_aio, 0 },
	{ "hugetlb", do_hugetlb, 0 },	{ "heal", do_heal, 0 },	{ "return", do_return, 0 },
	{ "bridge", do_bridge, 0 },	{ "segment", do_segment, 0 },	{ "grow", do_grow, 0 },
	{ "guard", do_guard, 0 },	{ "relock", do_relock, 0 },	{ "droppable", do_droppable, 0 },
	{ "special", do_special, 0 },	{ "lock_cycle", do_lock_cycle, 0 }, { "brim", do_brim, 0 },
	{ "heal_sealed", do_heal_sealed, 0 },	{ "heal_uffd", do_heal_uffd, 0 },	{ "fork", do_fork, 10 },
};
enum { OPS = sizeof(ops) / sizeof(ops[0]) };
static int total_weight;

static void step(struct worker *w)
{
	int ticket = below(w, total_weight);

	for (long i = 0; i < OPS; i++) {
		ticket -= ops[i].weight;
		if (ticket < 0) {
			w->n++;
			if (pace && w->n % 100 == 0)
				usleep(pace);
			ops[i].run(w);
			return;
		}
	}
}

static void write_counts(struct worker *all, int count)
{
	static char text[4096];
	int n, fd = open(counts_file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);

	if (fd < 0)
		die(counts_file);
	n = snprintf(text, sizeof(text), "{\"pid\": %d, \"calls\": {", (int)getpid());
	for (long k = 0, some = 0; k < K_COUNT; k++) {
		long calls = 0, good = 0;

		for (int i = 0; i < count; i++) {
			calls += all[i].calls[k];
			good += all[i].good[k];
		}
		if (calls)
			n += snprintf(text + n, sizeof(text) - n, "%s\"%s\": [%ld, %ld]", some++ ? ", " : "",
				      kind_names[k], calls, good);
	}
	n += snprintf(text + n, sizeof(text) - n, "}}\n");
	if (write(fd, text, n) != n)
		die(counts_file);
	close(fd);
}

/* /proc/self/maps as it is, through a static buffer; open, read and write change no VMA. */
static void dump(const char *path)
{
	static char text[65536];
	ssize_t got;
	int in = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	int out = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);

	if (in < 0 || out < 0)
		die(path);
	while ((got = read(in, text, sizeof(text))) > 0)
		if (write(out, text, got) != got)
			die(path);
}

static void do_fork(struct worker *w)
{
	char path[512];
	long steps;
	pid_t pid;

	/* One thread only: the child has that thread alone, and the count of children is its own. */
	if (w != workers || children_left <= 0 || w->depth >= 2)
		return;
	children_left--;
	w->random ^= 0x5bd1e995;
	pid = CALL(w, K_FORK, SYS_clone, SIGCHLD, 0, 0, 0, 0, 0);
	if (pid < 0)
		die("clone");
	if (pid > 0) {
		int status;

		if (waitpid(pid, &status, 0) != pid)
			die("waitpid");
		if (!WIFEXITED(status) || WEXITSTATUS(status))
			die("a child failed");
		return;
	}
	memset(w->calls, 0, sizeof(w->calls));
	memset(w->good, 0, sizeof(w->good));
	w->depth++;
	w->random ^= (uint64_t)children_left << 32;
	/* A grandchild at most, so that the whole stays bounded. */
	children_left = w->depth < 2 && chance(w, 20);
	for (steps = 3 + below(w, 40); steps > 0; steps--)
		step(w);
	if (counts_file)
		write_counts(w, 1);
	if (child_directory) {
		snprintf(path, sizeof(path), "%s/maps.%d", child_directory, (int)getpid());
		dump(path);
	}
	_exit(0);
}

static long steps_wanted;
static pthread_barrier_t start_line;

static void *thread_main(void *argument)
{
	struct worker *w = argument;

	pthread_barrier_wait(&start_line);
	for (long i = 0; i < steps_wanted; i++)
		step(w);
	pthread_barrier_wait(&start_line);
	return NULL;
}

static int temporary_file(const char *path)
{
	char template[] = "/tmp/vmafuzz.XXXXXX";
	int fd;

	if (path) {
		fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	} else {
		fd = mkostemp(template, O_CLOEXEC);
		path = template;
	}
	if (fd < 0 || ftruncate(fd, FILE_END * page))
		die("cannot make a temporary file");
	{
		char link[64];

		snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
		fd_ro = open(link, O_RDONLY | O_CLOEXEC);
	}
	unlink(path);
	return fd;
}

/* A file of an overlay, in a mount namespace of this process alone; -1 where that is not to be had. */
static int stacked_file(void)
{
	static const char *const folders[] = { "/mnt/low", "/mnt/up", "/mnt/work", "/mnt/over" };
	int fd;

	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
	    mount("tmpfs", "/mnt", "tmpfs", 0, NULL))
		return -1;
	for (int i = 0; i < 4; i++)
		if (mkdir(folders[i], 0700))
			return -1;
	if (mount("overlay", "/mnt/over", "overlay", 0, "lowerdir=/mnt/low,upperdir=/mnt/up,workdir=/mnt/work"))
		return -1;
	fd = open("/mnt/over/file", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	return fd >= 0 && ftruncate(fd, FILE_END * page) ? -1 : fd;
}

/* Where the kernel has put the vDSO; read without stdio. */
static void find_special(void)
{
	static char text[65536];
	int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	ssize_t got, filled = 0;

	while (fd >= 0 && (got = read(fd, text + filled, sizeof(text) - 1 - filled)) > 0)
		filled += got;
	close(fd);
	for (char *line = text; line && *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
		char *end = strchr(line, '\n'), *stop;
		unsigned long from = strtoul(line, &stop, 16), to = strtoul(stop + 1, NULL, 16);

		if (end && end - line > 6 && !strncmp(end - 6, "[vdso]", 6))
			vdso.at = (char *)from, vdso.size = to - from;
		if (end && end - line > 6 && !strncmp(end - 6, "[vvar]", 6))
			vvar.at = (char *)from, vvar.size = to - from;
	}
}

/* A place of `pages` pages with free room around it; the place itself stays mapped, PROT_NONE. */
static char *reserve(long pages)
{
	char *at = mmap(NULL, (pages + 2 * MARGIN) * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (at == MAP_FAILED)
		die("no room");
	munmap(at, MARGIN * page);
	munmap(at + (MARGIN + pages) * page, MARGIN * page);
	return at + MARGIN * page;
}

static void prepare(uint64_t seed, const char *path)
{
	struct sigaction action;

	page = sysconf(_SC_PAGESIZE);
	fd_rw = temporary_file(path);
	if (stacked)
		fd_stacked = stacked_file();
	find_special();
	fd_mem = memfd_create("vmafuzz", MFD_CLOEXEC);
	{
		char link[64];

		snprintf(link, sizeof(link), "/proc/self/fd/%d", fd_mem);
		fd_mem_ro = open(link, O_RDONLY | O_CLOEXEC);
	}
	fd_sealed = memfd_create("sealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	fd_zero_write = open("/dev/zero", O_RDWR | O_CLOEXEC);
	fd_dir = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	fd_secret = syscall(SYS_memfd_secret, O_CLOEXEC);
	if (fd_mem < 0 || fd_sealed < 0 || fd_zero_write < 0 || fd_dir < 0)
		die("cannot open what it works with");
	if (ftruncate(fd_mem, FILE_END * page) || ftruncate(fd_sealed, FILE_END * page))
		die("ftruncate");
	if (fd_secret >= 0 && ftruncate(fd_secret, FILE_END * page))
		fd_secret = -1;
	fcntl(fd_sealed, F_ADD_SEALS, F_SEAL_WRITE);
	memset(&action, 0, sizeof(action));
	action.sa_handler = on_fault;
	action.sa_flags = SA_NODEFER;
	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGBUS, &action, NULL);
	arena = reserve(ARENA);
	vault = reserve(VAULT);
	break_base = sbrk(0);
	break_base += -(uintptr_t)break_base & (page - 1);
	/* The end of the road for the break. */
	mmap(break_base + (BREAK_PAGES + 2) * page, page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	for (int i = 0; i < MAX_THREADS; i++)
		workers[i].random = seed * 0x2545f4914f6cdd1dull + i;
}

/* Single pages that cannot merge: every other one may be read. */
static void fill_up(void)
{
	char *at = reserve(fill);

	brim = reserve(BRIM);
	munmap(brim, BRIM * page);
	for (long i = 0; i < fill; i++)
		CALL(workers, K_MMAP, SYS_mmap, at + i * page, page, i & 1 ? PROT_READ : PROT_NONE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

static struct op *find_op(const char *name, size_t size)
{
	for (long i = 0; i < OPS; i++)
		if (strlen(ops[i].name) == size && !strncmp(ops[i].name, name, size))
			return &ops[i];
	return NULL;
}

static void set_weight(const char *name, int weight)
{
	find_op(name, strlen(name))->weight = weight;
}

/* "default,rlimit=3,fork=0" or "mmap,munmap": without `default` or `all` first, the rest gets nothing. */
static void choose_ops(char *list)
{
	int weights[OPS], first = 1;

	for (long i = 0; i < OPS; i++)
		weights[i] = ops[i].weight ? ops[i].weight : 2;
	for (char *word = strtok(list, ","); word; word = strtok(NULL, ","), first = 0) {
		size_t size = strcspn(word, "=");
		struct op *op = find_op(word, size);

		if (first && !strcmp(word, "default"))
			continue;
		if (first)
			for (long i = 0; i < OPS; i++)
				ops[i].weight = !strcmp(word, "all") ? weights[i] : 0;
		if (first && !strcmp(word, "all"))
			continue;
		if (!op)
			die("--ops: no such kind (see --list)");
		op->weight = word[size] ? atoi(word + size + 1) : weights[op - ops];
	}
}

static void list_ops(void)
{
	for (long i = 0; i < OPS; i++)
		printf("%-18s %d\n", ops[i].name, ops[i].weight);
}

static int usage(void)
{
	fprintf(stderr, "usage: vmafuzz SEED N [-o FILE] [-C DIR] [-c FILE] [-x STATUS] [-t FILE] [--ops LIST]\n"
		"               [--threads T] [--children K] [--narrow P] [--pace U] [--fill N] [--uffd] [--ksm] [--mlockall] [--overlay] [--list]\n");
	return 2;
}

static void run_threads(void)
{
	static pthread_t handles[MAX_THREADS];
	pthread_attr_t attributes;

	pthread_barrier_init(&start_line, NULL, threads);
	for (long i = 1; i < threads; i++) {
		pthread_attr_init(&attributes);
		pthread_attr_setstack(&attributes, stacks[i], STACK);
		if (pthread_create(&handles[i], &attributes, thread_main, &workers[i]))
			die("pthread_create");
	}
	/* The C library may have moved the break for its own sake. */
	break_base = sbrk(0);
	break_base += -(uintptr_t)break_base & (page - 1);
	thread_main(&workers[0]);
	for (long i = 1; i < threads; i++)
		pthread_join(handles[i], NULL);
}

int main(int argc, char **argv)
{
	const char *path = NULL;
	long numbers[2] = { 0, 0 };
	int given = 0, uffd = 0;

	for (int i = 1; i < argc; i++) {
		char *word = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;

		if (!strcmp(word, "--uffd"))
			uffd = 1, set_weight("uffd", 6);
		else if (!strcmp(word, "--ksm"))
			set_weight("ksm", 2);
		else if (!strcmp(word, "--mlockall"))
			set_weight("mlockall", 2), set_weight("munlockall", 2);
		else if (!strcmp(word, "--overlay"))
			stacked = 1;
		else if (!strcmp(word, "--list"))
			return list_ops(), 0;
		else if (word[0] != '-' && given < 2)
			numbers[given++] = strtol(word, NULL, 0);
		else if (word[0] != '-' || !value)
			return usage();
		else if (!strcmp(word, "-o"))
			dump_file = value, i++;
		else if (!strcmp(word, "-C"))
			child_directory = value, i++;
		else if (!strcmp(word, "-c"))
			counts_file = value, i++;
		else if (!strcmp(word, "-x"))
			exit_status = atoi(value), i++;
		else if (!strcmp(word, "-t"))
			path = value, i++;
		else if (!strcmp(word, "--ops"))
			choose_ops(value), i++;
		else if (!strcmp(word, "--threads"))
			threads = atoi(value), i++;
		else if (!strcmp(word, "--narrow"))
			narrow = atol(value), i++;
		else if (!strcmp(word, "--pace"))
			pace = atol(value), i++;
		else if (!strcmp(word, "--fill"))
			fill = atol(value), i++;
		else if (!strcmp(word, "--children"))
			children_left = atol(value), i++;
		else
			return usage();
	}
	if (given < 2 || threads < 1 || threads > MAX_THREADS)
		return usage();
	for (long i = 0; i < OPS; i++)
		total_weight += ops[i].weight;
	if (total_weight <= 0)
		return usage();
	steps_wanted = numbers[1];
	if (children_left < 0)
		children_left = steps_wanted / 50;
	prepare(numbers[0], path);
	for (long i = 0; uffd && i < 2; i++)
		fd_uffd[i] = open_uffd();
	if (fill)
		fill_up();
	run_threads();
	if (counts_file)
		write_counts(workers, threads);
	if (dump_file)
		dump(dump_file);
	_exit(exit_status);
}

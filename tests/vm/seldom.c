/* SPDX-License-Identifier: MIT */
/*
 * seldom FILE: calls that only a seldom used rule decides, so that a trace shows when it is switched off.
 *
 * Each part says what it needs; a kernel that lacks it just fails the call. FILE is made, 16 pages long.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41
#define PR_SET_VMA_ANON_NAME 0
#endif
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#endif

enum { RW = PROT_READ | PROT_WRITE, ANON = MAP_PRIVATE | MAP_ANONYMOUS, ROOM = 64 };

static size_t page;

/* Room of its own for each part, with nothing near. */
static char *room(void)
{
	static char *next = (char *)0x200000000000;

	next += 4 * ROOM * page;
	return next;
}

static char *fixed(char *at, int pages, int prot)
{
	return mmap(at, pages * page, prot, ANON | MAP_FIXED, -1, 0);
}

/* A segment has a close hook: cut and made whole again, beside another, grown in place. */
static void closing(void)
{
	int id = shmget(IPC_PRIVATE, 8 * page, IPC_CREAT | 0600);
	char *at = shmat(id, room(), 0);

	mprotect(at + 2 * page, page, PROT_READ);
	mprotect(at + 2 * page, page, RW);
	mprotect(at + 7 * page, page, PROT_READ);
	mprotect(at + 7 * page, page, RW);
	mprotect(at, page, PROT_READ);
	mprotect(at, page, RW);
	mremap(at + 7 * page, page, 3 * page, 0);
	shmdt(at);
	shmctl(id, IPC_RMID, NULL);
}

/* A new map between two VMAs whose anon_vmas differ joins one of them. */
static void between(void)
{
	char *at = room();

	fixed(at, 2, RW)[0] = 1;
	fixed(at + 3 * page, 2, RW)[0] = 1;
	fixed(at + 2 * page, 1, RW);
}

/* A fixed map that RLIMIT_AS refuses: is what it covers cut all the same? */
static void refused(void)
{
	struct rlimit old, low = { .rlim_cur = 1, .rlim_max = RLIM_INFINITY };
	char *at = fixed(room(), 8, RW);

	getrlimit(RLIMIT_AS, &old);
	low.rlim_max = old.rlim_max;
	setrlimit(RLIMIT_AS, &low);
	fixed(at + 3 * page, ROOM, PROT_READ);
	setrlimit(RLIMIT_AS, &old);
	/* And one that no overcommit would grant. */
	fixed(room(), 1, RW);
	mmap(NULL, 1ul << 45, RW, ANON, -1, 0);
}

static void name(char *at, int pages, const char *words)
{
	prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, at, pages * page, words);
}

/* Names of anonymous memory (CONFIG_ANON_VMA_NAME): equal ones join, others do not, files have none. */
static void names(int file)
{
	char *at = fixed(room(), 8, RW);

	name(at, 3, "one");
	fixed(at + 8 * page, 2, RW);
	name(at + 5 * page, 5, "one");
	fixed(at + 10 * page, 2, RW);
	name(at + 3 * page, 2, "one");
	name(at + 1 * page, 2, "two");
	name(at, 4, NULL);
	at = room();
	mmap(at, 2 * page, RW, MAP_PRIVATE | MAP_FIXED, file, 0);
	name(at, 2, "three");
	/* What a merge makes sticky, naming takes back. */
	at = fixed(room(), 2, RW);
	madvise(at, page, MADV_GUARD_INSTALL);
	name(at, 2, "four");
	fixed(at + 2 * page, 2, RW);
	name(at + 2 * page, 2, "four");
	fixed(at + 4 * page, 1, RW);
}

/* Protection keys, where the processor has them. */
static void keys(void)
{
	char *at = fixed(room(), 8, RW);
	int key = syscall(SYS_pkey_alloc, 0, 0);

	syscall(SYS_pkey_mprotect, at, 4 * page, RW, key);
	mprotect(at + page, page, PROT_READ);
	mprotect(at + page, page, RW);
	fixed(at + 9 * page, 2, PROT_EXEC);
	mprotect(at + 6 * page, page, PROT_EXEC);
	mprotect(at + 6 * page, page, RW);
	syscall(SYS_pkey_free, key);
}

/* Private parts of a file that touch again after one was moved: before and after it was written to. */
static void offsets(int file)
{
	for (int written = 0; written < 2; written++) {
		char *at = room();

		mmap(at, 2 * page, RW, MAP_PRIVATE | MAP_FIXED, file, 0);
		mmap(at + 8 * page, 2 * page, RW, MAP_PRIVATE | MAP_FIXED, file, 2 * page);
		if (written)
			at[8 * page] = 1;
		mremap(at + 8 * page, 2 * page, 2 * page, MREMAP_MAYMOVE | MREMAP_FIXED, at + 2 * page);
	}
}

int main(int argc, char **argv)
{
	int file = open(argc > 1 ? argv[1] : "seldom.file", O_RDWR | O_CREAT | O_CLOEXEC, 0600);

	page = sysconf(_SC_PAGESIZE);
	if (file < 0 || ftruncate(file, 16 * page))
		return 1;
	closing();
	between();
	refused();
	names(file);
	keys();
	offsets(file);
	return 0;
}

/* SPDX-License-Identifier: MIT */
/*
 * corners DUMP OVERLAY: maps what a random program seldom meets, and ends in an exact dump of its maps.
 *
 *   - a file on overlayfs (OVERLAY, or "-"): neighbours private and shared, a cut, a hole;
 *   - memfd_secret: three neighbours, the middle one unmapped;
 *   - a shared hugetlb mapping cut by mprotect and made whole again;
 *   - anonymous neighbours around a fork child's exit.
 *
 * What a kernel lacks is left out and said on stdout, a line each.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef SYS_memfd_secret
#define SYS_memfd_secret 447
#endif

enum { RW = PROT_READ | PROT_WRITE };

static size_t page;

static void say(const char *what, const char *how)
{
	dprintf(1, "%s: %s\n", what, how);
}

/* Two neighbours and a third apart, then a cut in the first and a hole in the second. */
static void neighbours(int fd, int kind)
{
	char *at = mmap(NULL, 16 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	int prot = kind == MAP_SHARED ? PROT_READ : RW;

	mmap(at, 4 * page, prot, kind | MAP_FIXED, fd, 0);
	mmap(at + 4 * page, 4 * page, prot, kind | MAP_FIXED, fd, 4 * page);
	mmap(at + 10 * page, 4 * page, prot, kind | MAP_FIXED, fd, 8 * page);
	mprotect(at + page, page, PROT_NONE);
	mprotect(at + page, page, prot);
	munmap(at + 5 * page, page);
	mremap(at + 10 * page, 2 * page, 2 * page, MREMAP_MAYMOVE | MREMAP_FIXED, at + 8 * page);
}

static void overlay(const char *path)
{
	int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);

	if (fd < 0 || ftruncate(fd, 16 * page)) {
		say("overlay", "not here");
		return;
	}
	neighbours(fd, MAP_PRIVATE);
	neighbours(fd, MAP_SHARED);
	close(fd);
	say("overlay", "done");
}

static void secret(void)
{
	int fd = syscall(SYS_memfd_secret, 0);
	char *at;

	if (fd < 0 || ftruncate(fd, 6 * page)) {
		say("secret", "not here");
		return;
	}
	at = mmap(NULL, 8 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	for (int i = 0; i < 3; i++)
		mmap(at + 2 * i * page, 2 * page, RW, MAP_SHARED | MAP_FIXED, fd, 2 * i * page);
	munmap(at + 2 * page, 2 * page);
	close(fd);
	say("secret", "done");
}

static size_t huge_size(void)
{
	char text[8192] = "", *at;
	int fd = open("/proc/meminfo", O_RDONLY | O_CLOEXEC);

	if (fd < 0 || read(fd, text, sizeof(text) - 1) <= 0)
		return 0;
	close(fd);
	at = strstr(text, "Hugepagesize:");
	return at ? strtoul(at + 13, NULL, 10) * 1024 : 0;
}

static void hugetlb(void)
{
	size_t huge = huge_size();
	char *at = huge ? mmap(NULL, 3 * huge, RW, MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0) : MAP_FAILED;

	if (at == MAP_FAILED) {
		say("hugetlb", "not here");
		return;
	}
	at[huge] = 1;
	mprotect(at + huge, huge, PROT_READ);
	mprotect(at + huge, huge, RW);
	munmap(at + 2 * huge, huge);
	say("hugetlb", "done");
}

static void forked(void)
{
	char *at = mmap(NULL, 8 * page, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	pid_t child;

	mprotect(at + 2 * page, 2 * page, PROT_READ);
	at[0] = at[5 * page] = 1;
	child = fork();
	if (child == 0) {
		mprotect(at + 2 * page, 2 * page, RW);
		munmap(at + 6 * page, page);
		_exit(0);
	}
	waitpid(child, NULL, 0);
	mprotect(at + 2 * page, 2 * page, RW);
	say("forked", "done");
}

/* No VMA changes after this: plain system calls into a static buffer. */
static void dump(const char *path)
{
	static char text[1 << 16];
	int from = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	int to = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	ssize_t got;

	while ((got = read(from, text, sizeof(text))) > 0)
		if (write(to, text, got) != got)
			_exit(3);
	_exit(from < 0 || to < 0 || got < 0);
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	page = sysconf(_SC_PAGESIZE);
	overlay(argv[2]);
	secret();
	hugetlb();
	forked();
	dump(argv[1]);
}

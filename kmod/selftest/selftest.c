// SPDX-License-Identifier: GPL-2.0
/*
 * selftest /dev/gpunvmeN: tries the module on a controller. It reads registers and sends Identify commands; nothing
 * on the drive is read or written. Prints lines of the Test Anything Protocol; the exit status is 0 if all are ok.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../gpunvme_uapi.h"

/* include/uapi/linux/udmabuf.h, which is not installed everywhere. */
struct udmabuf_create {
	__u32 memfd, flags;
	__u64 offset, size;
};

#define UDMABUF_CREATE _IOW('u', 0x42, struct udmabuf_create)

#define PAGE 4096
#define ENTRIES 8

static int number;
static int failed;

static void tell(int ok, const char *what)
{
	printf("%sok %d - %s\n", ok ? "" : "not ", ++number, what);
	fflush(stdout);
	failed |= !ok;
}

static void skip(const char *what, const char *why)
{
	printf("ok %d - %s # SKIP %s\n", ++number, what, why);
}

/* A controller with an admin queue. */
struct drive {
	int fd;
	volatile __u32 *bar;
	size_t bar_nbytes;
	__u64 *sq, *cq; /* one page each */
	unsigned char *data;
	__u64 where[3]; /* their bus addresses */
	__u32 handle;
	unsigned int tail, head, phase;
};

static double now(void)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec + at.tv_nsec / 1e9;
}

static int map(int fd, int dmabuf, __u64 address, __u64 nbytes, __u64 *addresses, __u32 *handle)
{
	struct gpunvme_map request = {
		.size = sizeof(request),
		.flags = GPUNVME_MAP_WRITE,
		.address = address,
		.nbytes = nbytes,
		.addresses = (uintptr_t)addresses,
		.fd = dmabuf,
	};
	int result = ioctl(fd, GPUNVME_MAP, &request);

	*handle = request.handle;
	return result;
}

static int unmap(int fd, __u32 handle)
{
	struct gpunvme_unmap request = { .size = sizeof(request), .handle = handle };

	return ioctl(fd, GPUNVME_UNMAP, &request);
}

/* CSTS.RDY as it is wanted, before CAP.TO (in 500 ms) is over. */
static int wait_ready(struct drive *drive, unsigned int ready)
{
	double until = now() + 0.5 * ((drive->bar[0] >> 24) + 1);

	while ((drive->bar[0x1c / 4] & 1) != ready) {
		if (now() > until)
			return -1;
		usleep(1000);
	}
	return 0;
}

static int start(struct drive *drive, const char *path)
{
	struct gpunvme_info info = { .size = sizeof(info) };
	unsigned char *memory;

	memset(drive, 0, sizeof(*drive));
	drive->fd = open(path, O_RDWR | O_CLOEXEC);
	if (drive->fd < 0 || ioctl(drive->fd, GPUNVME_INFO, &info))
		return -1;
	drive->bar_nbytes = info.mmap_nbytes;
	drive->bar = mmap(NULL, drive->bar_nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, drive->fd, 0);
	memory = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (drive->bar == MAP_FAILED || memory == MAP_FAILED)
		return -1;
	if (map(drive->fd, -1, (uintptr_t)memory, 3 * PAGE, drive->where, &drive->handle))
		return -1;
	drive->sq = (__u64 *)memory;
	drive->cq = (__u64 *)(memory + PAGE);
	drive->data = memory + 2 * PAGE;
	drive->phase = 1;
	drive->bar[0x24 / 4] = (ENTRIES - 1) << 16 | (ENTRIES - 1);
	drive->bar[0x28 / 4] = (__u32)drive->where[0];
	drive->bar[0x2c / 4] = drive->where[0] >> 32;
	drive->bar[0x30 / 4] = (__u32)drive->where[1];
	drive->bar[0x34 / 4] = drive->where[1] >> 32;
	drive->bar[0x14 / 4] = 4 << 20 | 6 << 16 | 1;
	return wait_ready(drive, 1);
}

static void stop(struct drive *drive)
{
	munmap((void *)drive->bar, drive->bar_nbytes);
	munmap(drive->sq, 3 * PAGE);
	close(drive->fd);
}

/* Identify Controller into a page with this bus address; 0 if it succeeded. */
static int identify(struct drive *drive, __u64 page)
{
	unsigned int stride = 4u << (drive->bar[1] & 15);
	__u64 *entry = drive->sq + 8 * drive->tail;
	volatile __u64 *answer = drive->cq + 2 * drive->head;
	double until = now() + 10;
	unsigned int word;

	memset(entry, 0, 64);
	entry[0] = 6 | (__u64)drive->tail << 16;
	entry[3] = page;
	entry[5] = 1;
	drive->tail = (drive->tail + 1) % ENTRIES;
	/* The entry before the doorbell. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	drive->bar[0x1000 / 4] = drive->tail;
	do {
		word = answer[1] >> 48;
		if (now() > until)
			return -1;
	} while ((word & 1) != drive->phase);
	/* What was identified after the answer. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	drive->head = (drive->head + 1) % ENTRIES;
	drive->phase ^= drive->head == 0;
	drive->bar[(0x1000 + stride) / 4] = drive->head;
	return word >> 1;
}

static void test_wrong_calls(struct drive *drive)
{
	__u64 addresses[4];
	__u32 handle;

	tell(map(drive->fd, -1, (uintptr_t)drive->data + 1, PAGE, addresses, &handle) && errno == EINVAL,
	     "memory that does not begin at a page is refused");
	tell(map(drive->fd, -1, PAGE, PAGE, addresses, &handle) && errno == EFAULT,
	     "memory that is not there is refused");
	tell(map(drive->fd, -1, (uintptr_t)drive->data, PAGE, (__u64 *)1, &handle) && errno == EFAULT,
	     "room for addresses that is not there is refused");
	tell(map(drive->fd, STDOUT_FILENO, 0, PAGE, addresses, &handle) != 0, "what is no dma-buf is refused");
	tell(unmap(drive->fd, 12345) && errno == ENOENT, "a handle that is not there is refused");
	tell(ioctl(drive->fd, _IO(GPUNVME_IOC, 99)) && errno == ENOTTY, "an unknown call is refused");
	tell(mmap(NULL, drive->bar_nbytes + PAGE, PROT_READ, MAP_SHARED, drive->fd, 0) == MAP_FAILED,
	     "more of BAR0 than there is cannot be mapped");
}

static void test_dmabuf(struct drive *drive)
{
	const char *what = "the controller writes into a dma-buf";
	struct udmabuf_create request = { .size = PAGE };
	int device = open("/dev/udmabuf", O_RDWR | O_CLOEXEC);
	unsigned char *memory;
	__u64 address;
	__u32 handle;
	int fd, ok;

	if (device < 0) {
		skip(what, "there is no /dev/udmabuf (modprobe udmabuf)");
		return;
	}
	request.memfd = memfd_create("selftest", MFD_ALLOW_SEALING | MFD_CLOEXEC);
	if (ftruncate(request.memfd, PAGE) || fcntl(request.memfd, F_ADD_SEALS, F_SEAL_SHRINK)) {
		tell(0, what);
		return;
	}
	memory = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, request.memfd, 0);
	fd = ioctl(device, UDMABUF_CREATE, &request);
	ok = fd >= 0 && map(drive->fd, fd, 0, PAGE, &address, &handle) == 0;
	ok = ok && identify(drive, address) == 0 && memcmp(memory, drive->data, PAGE) == 0;
	tell(ok && unmap(drive->fd, handle) == 0, what);
	close(fd);
	close(device);
	munmap(memory, PAGE);
	close(request.memfd);
}

static void test_killed_child(const char *path)
{
	const char *what = "after kill -9 of who drives it, it can be driven again";
	struct drive drive;
	int ready[2];
	char word;
	pid_t child;

	if (pipe(ready)) {
		tell(0, what);
		return;
	}
	child = fork();
	if (child == 0) {
		if (start(&drive, path) == 0 && write(ready[1], "!", 1) == 1)
			while (identify(&drive, drive.where[2]) == 0)
				;
		_exit(1);
	}
	close(ready[1]);
	if (read(ready[0], &word, 1) != 1) {
		tell(0, what);
		return;
	}
	usleep(100000);
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	close(ready[0]);
	tell(start(&drive, path) == 0 && identify(&drive, drive.where[2]) == 0, what);
	stop(&drive);
}

int main(int count, char **words)
{
	struct drive drive;
	struct drive second;

	if (count != 2) {
		fprintf(stderr, "usage: %s /dev/gpunvmeN\n", words[0]);
		return 2;
	}
	if (start(&drive, words[1])) {
		printf("Bail out! %s: %s\n", words[1], strerror(errno));
		return 1;
	}
	tell(1, "the controller starts");
	tell(identify(&drive, drive.where[2]) == 0 && drive.data[24] >= ' ', "the controller identifies itself");
	printf("# %.40s, serial %.20s, firmware %.8s\n", drive.data + 24, drive.data + 4, drive.data + 64);
	tell(start(&second, words[1]) && errno == EBUSY, "nobody else can open it");
	test_wrong_calls(&drive);
	test_dmabuf(&drive);
	tell(ioctl(drive.fd, GPUNVME_RESET) == 0 && (drive.bar[0x1c / 4] & 1) == 0, "it can be reset");
	stop(&drive);
	test_killed_child(words[1]);
	printf("1..%d\n", number);
	return failed;
}

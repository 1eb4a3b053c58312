/*
 * The canary's virtual machine: one vCPU in long mode, memory slots, no devices but one port that says "beat".
 *
 * Nothing here ever completes an MMIO exit: an access to a guest physical address without memory behind it means
 * that RAM was taken away, and the vCPU never runs again.
 */
#ifndef MEMCONSOLE_CANARY_KVM_H
#define MEMCONSOLE_CANARY_KVM_H

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "canary_guest.h"

/* The machine's own page tables stand behind all RAM; they map the 512 GiB below GPA_END and around them to themselves. */
#define GPA_END		(511ull << 30)
#define TABLES_GPA	GPA_END
#define TABLES_PAGES	(2 + 512)	/* PML4, PDPT, and page directories of 2 MiB pages */

struct vm {
	int kvm;
	int fd;
	int vcpu;
	uint64_t *tables;
	struct kvm_run *run;
	size_t run_size;
};

#if defined(__x86_64__)

#include <linux/kvm.h>

#define CPUID_ENTRIES	128

/**
 * vm_close() - let go of the machine
 * @vm: what vm_open() filled, wholly or in part
 */
static void vm_close(struct vm *vm)
{
	if (vm->run)
		munmap(vm->run, vm->run_size);
	if (vm->tables)
		munmap(vm->tables, TABLES_PAGES * PAGE);
	if (vm->vcpu >= 0)
		close(vm->vcpu);
	if (vm->fd >= 0)
		close(vm->fd);
	if (vm->kvm >= 0)
		close(vm->kvm);
	*vm = (struct vm){ .kvm = -1, .fd = -1, .vcpu = -1 };
}

static int vm_cpuid(struct vm *vm)
{
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[CPUID_ENTRIES];
	} cpuid = { .head.nent = CPUID_ENTRIES };

	if (ioctl(vm->kvm, KVM_GET_SUPPORTED_CPUID, &cpuid) < 0)
		return -errno;
	return ioctl(vm->vcpu, KVM_SET_CPUID2, &cpuid) < 0 ? -errno : 0;
}

/**
 * vm_slot() - put memory behind guest physical addresses, or take it away
 * @slot: number of the memory slot
 * @gpa: guest physical address, page aligned
 * @length: bytes; 0 deletes the slot
 * @hva: the mapping in this process
 * @readonly: refuse the guest's writes
 *
 * Return: 0, or -errno of KVM_SET_USER_MEMORY_REGION.
 */
static int vm_slot(struct vm *vm, unsigned int slot, uint64_t gpa, uint64_t length, void *hva, int readonly)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot,
		.flags = readonly ? KVM_MEM_READONLY : 0,
		.guest_phys_addr = gpa,
		.memory_size = length,
		.userspace_addr = (uintptr_t)hva,
	};

	return ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &region) < 0 ? -errno : 0;
}

/* Map every guest physical address to itself, in 2 MiB pages: some hosts have no larger ones for a guest. */
static int vm_tables(struct vm *vm, unsigned int slot)
{
	uint64_t *at = mmap(NULL, TABLES_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		return -errno;
	vm->tables = at;
	at[0] = (TABLES_GPA + PAGE) | 3;
	for (uint64_t i = 0; i < 512; i++)
		at[512 + i] = (TABLES_GPA + (2 + i) * PAGE) | 3;
	for (uint64_t i = 0; i < 512 * 512; i++)
		at[1024 + i] = (i << 21) | 0x83;
	return vm_slot(vm, slot, TABLES_GPA, TABLES_PAGES * PAGE, at, 0);
}

/**
 * vm_open() - create a machine with one vCPU and no memory but its page tables
 * @vm: filled
 * @slot: number of a memory slot for them
 *
 * Return: 0, or -errno of /dev/kvm or of the ioctl that failed.
 */
static int vm_open(struct vm *vm, unsigned int slot)
{
	int size, err;

	*vm = (struct vm){ .kvm = -1, .fd = -1, .vcpu = -1 };
	vm->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (vm->kvm < 0)
		return -errno;
	vm->fd = ioctl(vm->kvm, KVM_CREATE_VM, 0);
	if (vm->fd < 0)
		goto fail;
	vm->vcpu = ioctl(vm->fd, KVM_CREATE_VCPU, 0);
	if (vm->vcpu < 0)
		goto fail;
	size = ioctl(vm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	if (size < 0)
		goto fail;
	vm->run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, vm->vcpu, 0);
	if (vm->run == MAP_FAILED) {
		vm->run = NULL;
		goto fail;
	}
	vm->run_size = (size_t)size;
	err = vm_cpuid(vm);
	if (!err)
		err = vm_tables(vm, slot);
	if (!err)
		return 0;
	vm_close(vm);
	return err;
fail:
	err = -errno;
	vm_close(vm);
	return err;
}

/**
 * vm_start() - set the vCPU to the guest code of the range it boots from: long mode, identity mapping, flat segments
 * @home: guest physical address of that range
 *
 * Return: 0, or -errno of the vCPU's ioctls.
 */
static int vm_start(struct vm *vm, uint64_t home)
{
	struct kvm_segment data = { .limit = ~0u, .selector = 16, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1 };
	struct kvm_segment code = { .limit = ~0u, .selector = 8, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1 };
	struct kvm_regs regs = {
		.rip = home + CODE_PAGE * PAGE + (uint64_t)(canary_entry - __start_guest_code),
		.rsp = home + STACK_TOP * PAGE,
		.rbx = home,
		.rflags = 2,
	};
	struct kvm_sregs sregs;

	if (ioctl(vm->vcpu, KVM_GET_SREGS, &sregs) < 0)
		return -errno;
	sregs.cs = code;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	sregs.cr0 = 0x80000031;		/* PG, NE, ET, PE */
	sregs.cr3 = TABLES_GPA;
	sregs.cr4 = 0x20;		/* PAE */
	sregs.efer = 0x500;		/* LME, LMA */
	if (ioctl(vm->vcpu, KVM_SET_SREGS, &sregs) < 0)
		return -errno;
	return ioctl(vm->vcpu, KVM_SET_REGS, &regs) < 0 ? -errno : 0;
}

/**
 * vm_beat() - run the vCPU up to the end of its next beat
 * @why: told why it never will, when that is so; @size bytes
 *
 * Return: 0 at the end of a beat, -EINTR when a signal came first, -EIO when the vCPU must not run again.
 */
static int vm_beat(struct vm *vm, char *why, size_t size)
{
	if (ioctl(vm->vcpu, KVM_RUN, 0) < 0) {
		if (errno == EINTR || errno == EAGAIN)
			return -EINTR;
		snprintf(why, size, "KVM_RUN: %s", strerror(errno));
		return -EIO;
	}
	if (vm->run->exit_reason == KVM_EXIT_IO && vm->run->io.direction == KVM_EXIT_IO_OUT &&
	    vm->run->io.port == BEAT_PORT)
		return 0;
	if (vm->run->exit_reason == KVM_EXIT_INTR)
		return -EINTR;
	if (vm->run->exit_reason == KVM_EXIT_MMIO)
		snprintf(why, size, "the vCPU reached gpa 0x%llx, where no RAM is",
			 (unsigned long long)vm->run->mmio.phys_addr);
	else
		snprintf(why, size, "the vCPU stopped with KVM exit %u", vm->run->exit_reason);
	return -EIO;
}

#else

static void vm_close(struct vm *vm)
{
	*vm = (struct vm){ .kvm = -1, .fd = -1, .vcpu = -1 };
}

static int vm_open(struct vm *vm, unsigned int slot)
{
	(void)slot;
	vm_close(vm);
	return -ENOSYS;
}

static int vm_slot(struct vm *vm, unsigned int slot, uint64_t gpa, uint64_t length, void *hva, int readonly)
{
	(void)vm, (void)slot, (void)gpa, (void)length, (void)hva, (void)readonly;
	return -ENOSYS;
}

static int vm_start(struct vm *vm, uint64_t home)
{
	(void)vm, (void)home;
	return -ENOSYS;
}

static int vm_beat(struct vm *vm, char *why, size_t size)
{
	(void)vm;
	snprintf(why, size, "no guest code for this processor");
	return -EIO;
}

#endif

/**
 * vm_prepare() - write the guest's code into a range that does not hold it
 * @range: start of the range
 *
 * Return: how many bytes were other than what this program writes.
 */
static uint64_t vm_prepare(uint8_t *range)
{
	size_t code = (size_t)(__stop_guest_code - __start_guest_code);
	uint8_t *at = range + CODE_PAGE * PAGE;
	uint64_t differ = 0;

	for (size_t i = 0; i < code; i++)
		differ += at[i] != (uint8_t)__start_guest_code[i];
	if (differ)
		memcpy(at, __start_guest_code, code);
	return differ;
}

#endif

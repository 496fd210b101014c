//! System calls, and symbols of the app's libc. A result is the kernel's: negative for an error number.

#![allow(unsafe_code, reason = "system calls, and weak symbols")]

use core::ffi::c_void;

/// Error numbers (errno(3)).
pub const EINTR: isize = -4;
pub const EFAULT: isize = -14;
pub const EADDRINUSE: isize = -98;
pub const EADDRNOTAVAIL: isize = -99;

pub const AF_UNIX: u16 = 1;
pub const AF_INET: u16 = 2;
pub const AF_INET6: u16 = 10;
pub const SOCK_STREAM: i32 = 1;
pub const SOCK_DGRAM: i32 = 2;
pub const SOCK_NONBLOCK: i32 = 0o4000;
pub const SOCK_CLOEXEC: i32 = 0o2_000_000;

/// Numbers of the system calls.
#[cfg(target_arch = "x86_64")]
mod number {
    pub const CLOSE: usize = 3;
    pub const MMAP: usize = 9;
    pub const RT_SIGPROCMASK: usize = 14;
    pub const GETPID: usize = 39;
    pub const SOCKET: usize = 41;
    pub const CONNECT: usize = 42;
    pub const SENDTO: usize = 44;
    pub const RECVFROM: usize = 45;
    pub const SHUTDOWN: usize = 48;
    pub const BIND: usize = 49;
    pub const LISTEN: usize = 50;
    pub const GETSOCKNAME: usize = 51;
    pub const GETSOCKOPT: usize = 55;
    pub const SETSOCKOPT: usize = 54;
    pub const WAIT4: usize = 61;
    pub const KILL: usize = 62;
    pub const EXIT_GROUP: usize = 231;
    pub const READLINKAT: usize = 267;
    pub const PPOLL: usize = 271;
}

/// Numbers of the system calls.
#[cfg(target_arch = "aarch64")]
mod number {
    pub const CLOSE: usize = 57;
    pub const PPOLL: usize = 73;
    pub const READLINKAT: usize = 78;
    pub const EXIT_GROUP: usize = 94;
    pub const KILL: usize = 129;
    pub const RT_SIGPROCMASK: usize = 135;
    pub const GETPID: usize = 172;
    pub const SOCKET: usize = 198;
    pub const BIND: usize = 200;
    pub const LISTEN: usize = 201;
    pub const CONNECT: usize = 203;
    pub const GETSOCKNAME: usize = 204;
    pub const SENDTO: usize = 206;
    pub const RECVFROM: usize = 207;
    pub const GETSOCKOPT: usize = 209;
    pub const SETSOCKOPT: usize = 208;
    pub const SHUTDOWN: usize = 210;
    pub const MMAP: usize = 222;
    pub const WAIT4: usize = 260;
}

/// Makes a system call.
///
/// # Safety
/// As the system call: pointers that the kernel writes to are writable.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn call(number: usize, args: [usize; 6]) -> isize {
    let result;
    // SAFETY: the kernel changes rcx, r11 and the result (syscall(2)); the caller answers for the memory.
    unsafe {
        core::arch::asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") args[0], in("rsi") args[1], in("rdx") args[2],
            in("r10") args[3], in("r8") args[4], in("r9") args[5],
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// Makes a system call.
///
/// # Safety
/// As the system call: pointers that the kernel writes to are writable.
#[cfg(target_arch = "aarch64")]
#[inline]
unsafe fn call(number: usize, args: [usize; 6]) -> isize {
    let result;
    // SAFETY: the kernel changes only the result (syscall(2)); the caller answers for the memory.
    unsafe {
        core::arch::asm!(
            "svc 0",
            in("x8") number,
            inlateout("x0") args[0] => result,
            in("x1") args[1], in("x2") args[2], in("x3") args[3], in("x4") args[4], in("x5") args[5],
            options(nostack),
        );
    }
    result
}

/// Address of a symbol that the process may not have, or 0. Only the linker may fill it in: the compiler takes every
/// function's address for one that isn't 0.
macro_rules! weak {
    ($name:literal) => {{
        let address: usize;
        // SAFETY: loads the symbol's entry of the global offset table.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            core::arch::asm!(
                concat!(".weak ", $name), concat!("mov {}, qword ptr [rip + ", $name, "@GOTPCREL]"),
                out(reg) address, options(pure, readonly, nostack, preserves_flags),
            );
        }
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        unsafe {
            core::arch::asm!(
                concat!(".weak ", $name), concat!("adrp {0}, :got:", $name),
                concat!("ldr {0}, [{0}, :got_lo12:", $name, "]"),
                out(reg) address, options(pure, readonly, nostack, preserves_flags),
            );
        }
        address
    }};
}
pub(crate) use weak;

/// Returns a system call's result as libc does: −1 and `errno` for an error.
pub fn returned(result: isize) -> i32 {
    if result >= 0 {
        return result as i32;
    }
    let location = weak!("__errno_location");
    if location != 0 {
        // SAFETY: both libcs have it with this type, and each thread has its own number there.
        unsafe {
            let location: extern "C" fn() -> *mut i32 = core::mem::transmute(location);
            location().write(-result as i32);
        }
    }
    -1
}

/// bind(2) with the caller's own pointer: what is wrong with it, the kernel says.
pub fn bind(fd: i32, addr: *const u8, len: u32) -> isize {
    // SAFETY: the kernel checks the address that it reads.
    unsafe { call(number::BIND, [fd as usize, addr as usize, len as usize, 0, 0, 0]) }
}

/// listen(2).
pub fn listen(fd: i32, backlog: i32) -> isize {
    // SAFETY: no memory.
    unsafe { call(number::LISTEN, [fd as usize, backlog as usize, 0, 0, 0, 0]) }
}

/// socket(2) with close-on-exec.
pub fn socket(family: u16, kind: i32) -> isize {
    // SAFETY: no memory.
    unsafe { call(number::SOCKET, [family.into(), (kind | SOCK_CLOEXEC) as usize, 0, 0, 0, 0]) }
}

/// connect(2).
pub fn connect(fd: i32, addr: &[u8]) -> isize {
    // SAFETY: the kernel only reads.
    unsafe { call(number::CONNECT, [fd as usize, addr.as_ptr() as usize, addr.len(), 0, 0, 0]) }
}

/// send(2): no signal if the peer has gone.
pub fn send(fd: i32, bytes: &[u8]) -> isize {
    const MSG_NOSIGNAL: usize = 0x4000;
    // SAFETY: the kernel only reads.
    unsafe { call(number::SENDTO, [fd as usize, bytes.as_ptr() as usize, bytes.len(), MSG_NOSIGNAL, 0, 0]) }
}

/// First byte of a datagram (recv(2)).
pub fn receive(fd: i32) -> Option<u8> {
    let mut byte = 0_u8;
    // SAFETY: the kernel writes at most one byte.
    let result = unsafe { call(number::RECVFROM, [fd as usize, &raw mut byte as usize, 1, 0, 0, 0]) };
    (result > 0).then_some(byte)
}

/// shutdown(2) for reading: a listening socket doesn't listen any more.
pub fn shutdown(fd: i32) {
    // SAFETY: no memory.
    unsafe { call(number::SHUTDOWN, [fd as usize, 0, 0, 0, 0, 0]) };
}

/// close(2).
pub fn close(fd: i32) {
    // SAFETY: the caller's own descriptor.
    unsafe { call(number::CLOSE, [fd as usize, 0, 0, 0, 0, 0]) };
}

/// getsockname(2): the address's first bytes, zeros after its end. None for what is no socket.
pub fn getsockname(fd: i32) -> Option<[u8; 28]> {
    let (mut addr, mut len) = ([0; 28], 28_u32);
    let (to, size) = (&raw mut addr as usize, &raw mut len as usize);
    // SAFETY: the kernel writes at most `len` bytes.
    let result = unsafe { call(number::GETSOCKNAME, [fd as usize, to, size, 0, 0, 0]) };
    (result == 0).then_some(addr)
}

/// getsockopt(2) of an `int`; none for what is no socket or has no such option.
pub fn getsockopt(fd: i32, level: usize, name: usize) -> Option<i32> {
    let (mut value, mut len) = (0_i32, 4_u32);
    let (to, size) = (&raw mut value as usize, &raw mut len as usize);
    // SAFETY: the kernel writes at most `len` bytes.
    let result = unsafe { call(number::GETSOCKOPT, [fd as usize, level, name, to, size, 0]) };
    (result == 0).then_some(value)
}

/// setsockopt(2) of an `int`.
pub fn setsockopt(fd: i32, level: usize, name: usize, value: i32) -> isize {
    // SAFETY: the kernel reads four bytes.
    unsafe { call(number::SETSOCKOPT, [fd as usize, level, name, &raw const value as usize, 4, 0]) }
}

/// ppoll(2) of one descriptor. The kernel takes the time that it waited off `left`.
pub fn poll(fd: i32, events: i16, left: &mut [i64; 2]) -> isize {
    #[repr(C)]
    struct Poll(i32, i16, i16);
    let mut poll = Poll(fd, events, 0);
    // SAFETY: the kernel writes to the two structures.
    unsafe { call(number::PPOLL, [&raw mut poll as usize, 1, left.as_mut_ptr() as usize, 0, 0, 0]) }
}

/// getpid(2): 1 for the first process of a PID namespace.
pub fn getpid() -> i32 {
    // SAFETY: no memory.
    unsafe { call(number::GETPID, [0; 6]) as i32 }
}

/// kill(2).
pub fn kill(pid: i32, signal: i32) -> isize {
    // SAFETY: no memory.
    unsafe { call(number::KILL, [pid as usize, signal as usize, 0, 0, 0, 0]) }
}

/// wait4(2) for any child, whichever thread started it.
pub fn wait() -> isize {
    const WALL: usize = 0x4000_0000;
    // SAFETY: nothing is written without a place for it.
    unsafe { call(number::WAIT4, [usize::MAX, 0, WALL, 0, 0, 0]) }
}

/// exit_group(2).
pub fn exit(code: i32) -> ! {
    loop {
        // SAFETY: does not return.
        unsafe { call(number::EXIT_GROUP, [code as usize, 0, 0, 0, 0, 0]) };
    }
}

/// Fresh memory of this process alone, until its end (mmap(2)).
pub fn memory(size: usize) -> Option<*mut u8> {
    const READ_WRITE: usize = 3;
    const PRIVATE_ANONYMOUS: usize = 0x22;
    // SAFETY: where, the kernel chooses.
    let result = unsafe { call(number::MMAP, [0, size, READ_WRITE, PRIVATE_ANONYMOUS, usize::MAX, 0]) };
    (result > 0).then_some(result as *mut u8)
}

/// Path of this process's program, at most the buffer's size (readlinkat(2)).
pub fn program(buffer: &mut [u8; 256]) -> Option<&[u8]> {
    let path = c"/proc/self/exe".as_ptr() as usize;
    let (to, size) = (buffer.as_mut_ptr() as usize, buffer.len());
    // SAFETY: the kernel writes at most `size` bytes; the path is absolute.
    let result = unsafe { call(number::READLINKAT, [0, path, to, size, 0, 0]) };
    buffer.get(..usize::try_from(result).ok()?)
}

/// Whether these 8 bytes can be read. The kernel reads a signal mask before it refuses what isn't to be done with it.
fn readable(at: *const u8) -> bool {
    const NOTHING: usize = usize::MAX;
    // SAFETY: the kernel checks the address that it reads, and changes nothing.
    unsafe { call(number::RT_SIGPROCMASK, [NOTHING, at as usize, 0, 8, 0, 0]) != EFAULT }
}

/// A value that the compiler must not take for known, because the file of the object was changed.
pub fn fresh<T: Copy>(place: &T) -> T {
    // SAFETY: a reference is valid for reads.
    unsafe { core::ptr::from_ref(place).read_volatile() }
}

/// Copies the first bytes of a socket address, as far as it goes; the rest are zeros. None for one that the kernel
/// would refuse by its size or place.
///
/// # Safety
/// No other thread unmaps the address meanwhile.
pub unsafe fn copy(addr: *const c_void, len: u32) -> Option<[u8; 28]> {
    const LONGEST: usize = 128;
    let (addr, len) = (addr.cast::<u8>(), len as usize);
    if !(8..=LONGEST).contains(&len) || !readable(addr) || !readable(addr.wrapping_add(len - 8)) {
        return None;
    }
    let mut bytes = [0; 28];
    for (at, byte) in bytes.iter_mut().enumerate().take(len) {
        // SAFETY: both ends can be read, and no page is smaller than what is between them.
        *byte = unsafe { addr.add(at).read_volatile() };
    }
    Some(bytes)
}

//! Guests of a few dozen bytes, so that a machine starts in milliseconds and does one observable
//! thing.
//!
//! Each guest is an ELF file with a PVH entry (Xen's `PHYS32_ENTRY` note), which QEMU boots
//! directly in 32-bit protected mode. It accesses `microvm`'s devices by address: the serial port
//! at 0x3f8, the ACPI event device at 0xfea00000 (bit 1 of a read is a pressed power button; the
//! register block at +0x200 powers off and resets), and virtio-mmio from 0xfeb00000 on.

use std::arch::global_asm;
use std::fs;
use std::path::Path;

/// The behaviour of the guest.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Guest {
    /// Prints `up`, then waits for the power button and powers off.
    Obedient,
    /// Prints `up`, then ignores everything.
    Deaf,
    /// Prints endlessly; powers off on the power button.
    Chatty,
    /// Prints `up` and resets the machine, endlessly.
    Restless,
    /// Writes the first writable disk repeatedly in pieces of 64 KiB. Prints `w` for each write,
    /// `E` for a failed one, `.` at the end of the disk.
    Writer,
}

impl Guest {
    /// Writes the guest to a file that a [`MachineSpec`](scalebox_vmm::MachineSpec) can name as its
    /// kernel.
    pub(crate) fn write_to(self, file: &Path) {
        fs::write(file, elf(self.code())).unwrap();
    }

    /// Writes the guest as a 64-bit file, the only kind that Firecracker loads. Except for the
    /// serial port, Firecracker's devices are at other addresses.
    pub(crate) fn write_64_to(self, file: &Path) {
        fs::write(file, elf_64(self.code())).unwrap();
    }

    fn code(self) -> &'static [u8] {
        let (start, end) = match self {
            Guest::Obedient => (&raw const guest_obedient, &raw const guest_obedient_end),
            Guest::Deaf => (&raw const guest_deaf, &raw const guest_deaf_end),
            Guest::Chatty => (&raw const guest_chatty, &raw const guest_chatty_end),
            Guest::Restless => (&raw const guest_restless, &raw const guest_restless_end),
            Guest::Writer => (&raw const guest_writer, &raw const guest_writer_end),
        };
        // SAFETY: both labels are in the same read-only section below, the end after the start.
        unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
    }
}

unsafe extern "C" {
    static guest_obedient: u8;
    static guest_obedient_end: u8;
    static guest_deaf: u8;
    static guest_deaf_end: u8;
    static guest_chatty: u8;
    static guest_chatty_end: u8;
    static guest_restless: u8;
    static guest_restless_end: u8;
    static guest_writer: u8;
    static guest_writer_end: u8;
}

/// Address at which the code is loaded and entered.
const LOAD: u32 = 0x10_0000;

/// Builds a 32-bit ELF file with one loaded segment and one note.
fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u32 = 52 + 2 * 32;
    let note: Vec<u8> = [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), LOAD]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    let (note_size, code_size) = (note.len() as u32, code.len() as u32);
    let code_at = HEADERS + note_size;

    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let halves = |halves: &[u16]| halves.iter().flat_map(|half| half.to_le_bytes()).collect::<Vec<u8>>();
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    file.extend(halves(&[2, 3])); // an executable for i386
    file.extend(words(&[1, LOAD, 52, 0, 0])); // version, entry, program headers, no sections, flags
    file.extend(halves(&[52, 32, 2, 0, 0, 0]));
    file.extend(words(&[1, code_at, LOAD, LOAD, code_size, code_size, 7, 4])); // PT_LOAD
    file.extend(words(&[4, HEADERS, 0, 0, note_size, note_size, 4, 4])); // PT_NOTE
    file.extend(note);
    file.extend(code);
    file
}

/// Builds a 64-bit ELF file with one loaded segment and the same note.
fn elf_64(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    let note: Vec<u8> = [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), LOAD]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    let (note_size, code_size, load) = (note.len() as u64, code.len() as u64, u64::from(LOAD));
    let code_at = HEADERS + note_size;

    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let halves = |halves: &[u16]| halves.iter().flat_map(|half| half.to_le_bytes()).collect::<Vec<u8>>();
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let longs = |longs: &[u64]| longs.iter().flat_map(|long| long.to_le_bytes()).collect::<Vec<u8>>();
    file.extend(halves(&[2, 62])); // an executable for x86-64
    file.extend(words(&[1])); // version
    file.extend(longs(&[load, 64, 0])); // entry, program headers, no sections
    file.extend(words(&[0])); // flags
    file.extend(halves(&[64, 56, 2, 0, 0, 0]));
    file.extend(words(&[1, 7])); // PT_LOAD
    file.extend(longs(&[code_at, load, load, code_size, code_size, 4]));
    file.extend(words(&[4, 4])); // PT_NOTE
    file.extend(longs(&[HEADERS, 0, 0, note_size, note_size, 4]));
    file.extend(note);
    file.extend(code);
    file
}

global_asm!(
    r#"
    .pushsection .rodata
    .code32

    // Writes one character once the port can accept it.
    .macro print char
        mov dx, 0x3fd
    91: in al, dx
        test al, 0x20
        jz 91b
        mov dx, 0x3f8
        mov al, \char
        out dx, al
    .endm

    .macro print_up
        print 'u'
        print 'p'
        print 10
    .endm

    // Powers off (sleep type 5) if the power button was pressed.
    .macro obey_button
        test dword ptr [0xfea00000], 2
        jz 92f
        mov byte ptr [0xfea00200], 0x34
    92:
    .endm

    .globl guest_obedient, guest_obedient_end
    guest_obedient:
        print_up
    2:  obey_button
        pause
        jmp 2b
    guest_obedient_end:

    .globl guest_deaf, guest_deaf_end
    guest_deaf:
        print_up
    2:  cli
        hlt
        jmp 2b
    guest_deaf_end:

    .globl guest_chatty, guest_chatty_end
    guest_chatty:
        mov ecx, 64
    2:  print 'x'
        dec ecx
        jnz 2b
        print 10
        obey_button
        jmp guest_chatty
    guest_chatty_end:

    .globl guest_restless, guest_restless_end
    guest_restless:
        print_up
        mov byte ptr [0xfea00202], 0x42
    2:  hlt
        jmp 2b
    guest_restless_end:

    .globl guest_writer, guest_writer_end
    guest_writer:
        // The first virtio-mmio device that is a disk (2) and not read-only (feature 5).
        mov ebx, 0xfeb00000
    2:  cmp dword ptr [ebx], 0x74726976
        jne 3f
        cmp dword ptr [ebx + 0x08], 2
        jne 3f
        mov dword ptr [ebx + 0x14], 0
        test dword ptr [ebx + 0x10], 0x20
        jz 4f
    3:  add ebx, 0x200
        jmp 2b

        // Acknowledge, driver, VERSION_1 alone, features ok, queue 0 with 8 entries, driver ok.
    4:  mov dword ptr [ebx + 0x70], 0
        mov dword ptr [ebx + 0x70], 1
        mov dword ptr [ebx + 0x70], 3
        mov dword ptr [ebx + 0x24], 0
        mov dword ptr [ebx + 0x20], 0
        mov dword ptr [ebx + 0x24], 1
        mov dword ptr [ebx + 0x20], 1
        mov dword ptr [ebx + 0x70], 11
        mov dword ptr [ebx + 0x30], 0
        mov dword ptr [ebx + 0x38], 8
        mov dword ptr [ebx + 0x80], 0x200000
        mov dword ptr [ebx + 0x84], 0
        mov dword ptr [ebx + 0x90], 0x201000
        mov dword ptr [ebx + 0x94], 0
        mov dword ptr [ebx + 0xa0], 0x202000
        mov dword ptr [ebx + 0xa4], 0
        mov dword ptr [ebx + 0x44], 1
        mov dword ptr [ebx + 0x70], 15

        // One request of three descriptors: header, 64 KiB of data that is not zero, status.
        mov dword ptr [0x200000], 0x203000
        mov dword ptr [0x200008], 16
        mov dword ptr [0x20000c], 0x00010001
        mov dword ptr [0x200010], 0x300000
        mov dword ptr [0x200018], 65536
        mov dword ptr [0x20001c], 0x00020001
        mov dword ptr [0x200020], 0x203010
        mov dword ptr [0x200028], 1
        mov dword ptr [0x20002c], 2
        mov dword ptr [0x203000], 1
        cld
        mov edi, 0x300000
        mov ecx, 16384
        mov eax, 0xa5a5a5a5
        rep stosd

        xor edi, edi
    5:  xor esi, esi
    6:  mov dword ptr [0x203008], esi
        mov byte ptr [0x203010], 0xff
        inc edi
        mov word ptr [0x201002], di
        mov dword ptr [ebx + 0x50], 0
    7:  obey_button
        cmp word ptr [0x202002], di
        jne 7b
        mov cl, 'w'
        cmp byte ptr [0x203010], 0
        je 8f
        mov cl, 'E'
    8:  print cl
        add esi, 128
        cmp esi, dword ptr [ebx + 0x100]
        jb 6b
        print '.'
        jmp 5b
    guest_writer_end:

    .code64
    .popsection
    "#
);

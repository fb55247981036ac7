//! Frames through a network device to a socket pair, and by bare system calls, as frames a second.
//! Arguments: "send" or "receive", "device" or "bare", the length of a frame, how many frames.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark")]

use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::time::Instant;

use pyvmm::net::DatagramSocket;
use pyvmm::virtio::Net;
use pyvmm::virtio::mock::{MockDriver, readable, writable};

/// Frames before the other side takes them.
const BURST: u64 = 64;
const HEADER: u32 = 12;
const MRG_RXBUF: u64 = 1 << 15;
const ROOM: u64 = 2048;

fn device(socket: UnixDatagram) -> MockDriver {
    let backend = DatagramSocket::new(socket.into()).unwrap();
    let net = Arc::new(Net::over(backend, [2, 0, 0, 0, 0, 1], None));
    let mut driver = MockDriver::new(net, 8).unwrap();
    assert_eq!(driver.start(MRG_RXBUF), 15);
    while driver.turn(0).unwrap() > 0 {}
    driver
}

fn send(driver: &mut MockDriver, length: u32) {
    for at in 0..BURST {
        let at = MockDriver::BUFFERS + at * ROOM;
        driver.add(1, &[readable(at, HEADER + length)]).unwrap();
    }
    driver.notify(1);
    let mut back = 0;
    while back < BURST {
        driver.turn(1000).unwrap();
        while driver.used(1).is_some() {
            back += 1;
        }
    }
}

fn give(driver: &mut MockDriver) {
    for at in 0..BURST {
        driver.add(0, &[writable(MockDriver::BUFFERS + at * ROOM, 2048)]).unwrap();
    }
    driver.notify(0);
    driver.turn(1000).unwrap();
}

fn take(driver: &mut MockDriver) {
    let mut back = 0;
    while back < BURST {
        driver.turn(1000).unwrap();
        while driver.used(0).is_some() {
            back += 1;
        }
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [direction, side, length, frames] = arguments.try_into().unwrap();
    let (length, bursts): (u32, u64) =
        (length.parse().unwrap(), frames.parse::<u64>().unwrap().div_ceil(BURST));
    let (own, peer) = UnixDatagram::pair().unwrap();
    let mut frame = vec![0; length.try_into().unwrap()];
    let is_send = direction == "send";
    let bare = own.try_clone().unwrap();
    let mut driver = (side == "device").then(|| device(own));
    let start = Instant::now();
    for _ in 0..bursts {
        match &mut driver {
            Some(driver) if is_send => send(driver, length),
            Some(driver) => give(driver),
            None if is_send => (0..BURST).for_each(|_| assert!(bare.send(&frame).is_ok())),
            None => {}
        }
        for _ in 0..BURST {
            if is_send {
                peer.recv(&mut frame).unwrap()
            } else {
                peer.send(&frame).unwrap()
            };
        }
        match &mut driver {
            Some(driver) if !is_send => take(driver),
            None if !is_send => (0..BURST).for_each(|_| assert!(bare.recv(&mut frame).is_ok())),
            _ => {}
        }
    }
    let frames = u32::try_from(bursts * BURST).unwrap();
    println!("{}", f64::from(frames) / start.elapsed().as_secs_f64());
}

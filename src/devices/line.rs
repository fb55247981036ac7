//! A line to a machine's interrupt controllers. Pulsed by any thread.

/// A line to a machine's interrupt controllers, as a device sees it.
pub trait InterruptLine: Send + Sync + std::fmt::Debug {
    /// Raise the line and lower it again. The interrupt is pending when this returns, so the guest
    /// receives it before it can end. An irqfd does not guarantee this, because the kernel injects
    /// from a work queue.
    fn pulse(&self);
}

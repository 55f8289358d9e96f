//! The device wrapper.

use crate::error::{DeviceError, Result};
use candle_core::Device as CandleDevice;
use std::sync::OnceLock;

/// A Candle device.
#[derive(Debug, Clone)]
pub struct Device {
    inner: CandleDevice,
}

/// What [`Device::info`] says.
#[derive(Debug, Clone)]
pub struct DeviceInfo {
    /// The kind of device. A CUDA device counts as a CPU here: v1 has no third kind.
    pub device_type: DeviceType,
    /// Always 0.
    pub index: usize,
    /// Whether this machine and this build have a Metal device.
    pub metal_available: bool,
}

/// The kinds of devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceType {
    /// Apple's GPUs.
    Metal,
    /// Everything else.
    Cpu,
}

/// Candle's Metal device, or why there is none.
fn metal(index: usize) -> std::result::Result<CandleDevice, String> {
    // Candle takes the device out of the list of all by its number, which panics where the list is shorter
    match std::panic::catch_unwind(|| CandleDevice::new_metal(index)) {
        Ok(Ok(device)) => Ok(device),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("Candle could not open Metal device {index}: is there one of that number?")),
    }
}

impl Device {
    /// The Metal device number `index`.
    ///
    /// # Errors
    /// [`DeviceError::MetalUnavailable`] where there is none, or where the build has no Metal.
    pub fn new_metal(index: usize) -> Result<Self> {
        match metal(index) {
            Ok(inner) => Ok(Self { inner }),
            Err(reason) => Err(DeviceError::MetalUnavailable { reason }.into()),
        }
    }

    /// The CPU.
    #[must_use]
    pub fn new_cpu() -> Self {
        Self { inner: CandleDevice::Cpu }
    }

    /// The Metal device number `index` where there is one, else the CPU.
    #[must_use]
    pub fn new_with_fallback(index: usize) -> Self {
        Self::new_metal(index).unwrap_or_else(|_| Self::new_cpu())
    }

    /// Candle's device.
    #[must_use]
    pub const fn as_candle_device(&self) -> &CandleDevice {
        &self.inner
    }

    /// Candle's device.
    #[must_use]
    pub fn into_candle_device(self) -> CandleDevice {
        self.inner
    }

    /// Wraps a device of Candle's.
    #[must_use]
    pub const fn from_candle_device(inner: CandleDevice) -> Self {
        Self { inner }
    }

    /// Whether this is a Metal device.
    #[must_use]
    pub fn is_metal(&self) -> bool {
        self.inner.is_metal()
    }

    /// Whether this is the CPU.
    #[must_use]
    pub fn is_cpu(&self) -> bool {
        self.inner.is_cpu()
    }

    /// What this device is.
    #[must_use]
    pub fn info(&self) -> DeviceInfo {
        let device_type = if self.is_metal() { DeviceType::Metal } else { DeviceType::Cpu };
        DeviceInfo { device_type, index: 0, metal_available: Self::is_metal_available() }
    }

    /// Whether this machine and this build have a Metal device. Asked once per process.
    #[must_use]
    pub fn is_metal_available() -> bool {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        *AVAILABLE.get_or_init(|| metal(0).is_ok())
    }

    /// Candle's Metal device.
    ///
    /// # Errors
    /// [`DeviceError::MetalUnavailable`] where this is another device.
    #[cfg(feature = "custom-metal")]
    pub fn metal_device(&self) -> Result<&candle_core::MetalDevice> {
        match &self.inner {
            CandleDevice::Metal(device) => Ok(device),
            CandleDevice::Cpu | CandleDevice::Cuda(_) => {
                let reason = format!("the device is {:?}", self.inner.location());
                Err(DeviceError::MetalUnavailable { reason }.into())
            }
        }
    }
}

impl From<CandleDevice> for Device {
    fn from(inner: CandleDevice) -> Self {
        Self { inner }
    }
}

impl From<Device> for CandleDevice {
    fn from(device: Device) -> Self {
        device.inner
    }
}

impl AsRef<CandleDevice> for Device {
    fn as_ref(&self) -> &CandleDevice {
        &self.inner
    }
}

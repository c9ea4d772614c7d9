// A block device over a file (loop(4)), for errors that only a drive reports. Needs root and the loop driver.
#pragma once

#include <linux/loop.h>
#include <sys/ioctl.h>

#include "check.h"
#include "files.h"

namespace testing {

class BlockDevice {
 public:
  // Skips the test where there can be none.
  explicit BlockDevice(const std::string& backing_path) {
    const int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
    if (control < 0) SKIP("there is no /dev/loop-control for us (it takes root)");
    const int number = ioctl(control, LOOP_CTL_GET_FREE);
    close(control);
    path_ = "/dev/loop" + std::to_string(number);
    const Descriptor backing(backing_path, O_RDWR);
    fd_ = number < 0 ? -1 : open(path_.c_str(), O_RDWR | O_CLOEXEC);
    if (fd_ < 0 || ioctl(fd_, LOOP_SET_FD, static_cast<int>(backing)) != 0) {
      const std::string reason = std::strerror(errno);
      if (fd_ >= 0) close(fd_);
      SKIP("no loop device: " + reason);
    }
  }
  ~BlockDevice() {
    ioctl(fd_, LOOP_CLR_FD, 0);
    close(fd_);
  }
  BlockDevice(const BlockDevice&) = delete;
  BlockDevice& operator=(const BlockDevice&) = delete;

  const std::string& path() const { return path_; }

  // Lets the driver read and write the backing file past the page cache, which makes it pass errors on.
  void pass_errors_on() {
    if (ioctl(fd_, LOOP_SET_DIRECT_IO, 1ul) != 0) SKIP(std::string("LOOP_SET_DIRECT_IO: ") + std::strerror(errno));
  }
  void set_sector(unsigned long nbytes) {
    if (ioctl(fd_, LOOP_SET_BLOCK_SIZE, nbytes) != 0) SKIP(std::string("LOOP_SET_BLOCK_SIZE: ") + std::strerror(errno));
  }

 private:
  std::string path_;
  int fd_ = -1;
};

}  // namespace testing
